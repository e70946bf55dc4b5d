"""The spec that is found where none is named."""

import torch

import zoscope

H = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
problem = zoscope.Problem.from_function(lambda x: 0.5 * (H * x * x).sum(), torch.full_like(H, 0.125))
