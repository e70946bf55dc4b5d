from pathlib import Path

import pytest
import torch
from torch import nn

from zoscope import Problem, UsageError
from zoscope.curvature.preconditioner import stored_preconditioner

BETAS, EPS = (0.8, 0.95), 1e-6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


BATCH = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)


def trained(model: nn.Module, kind=torch.optim.Adam, *, named: bool = False, steps: int = 3, **options):
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = kind(parameters, lr=1e-3, betas=BETAS, eps=EPS, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, BATCH).backward()
        optimizer.step()
    return optimizer


def read(path: Path, model: nn.Module, *, params: str | None = None, betas=BETAS, eps=EPS):
    with Problem(model, [BATCH], loss, params=params).prepare(device="cpu") as objective:
        return stored_preconditioner(path, objective=objective, betas=betas, eps=eps)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_stored_preconditioner_is_what_the_next_step_divides_by(tmp_path: Path, kind) -> None:
    model = network()
    optimizer = trained(model, kind, weight_decay=0.0)
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    found = read(tmp_path / "adam.pt", model)
    before = torch.cat([p.detach().clone().reshape(-1) for p in model.parameters()])
    # A step of zero gradient moves by lr m' / P', with m' = β₁m and v' = β₂v at step t + 1.
    momentum = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in model.parameters()])
    second = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()])
    expected = (1 - BETAS[0] ** 3) * ((second / (1 - BETAS[1] ** 3)).sqrt() + EPS)
    assert torch.allclose(found.diagonal, expected, rtol=1e-12)
    assert found.remarks == ()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["exp_avg_sq"] /= BETAS[1]
        optimizer.state[p]["step"] -= 1  # so that torch's own step ends where the file stands
    optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.allclose(before - after, 1e-3 * BETAS[0] * momentum / found.diagonal, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict"])
def test_a_checkpoint_may_hold_the_state(tmp_path: Path, key: str) -> None:
    model = network()
    torch.save({key: trained(model).state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    assert read(tmp_path / "checkpoint.pt", model).diagonal.numel() == 26


def test_names_in_the_file_select_the_right_parameters(tmp_path: Path) -> None:
    model = network()
    torch.save(trained(model, named=True).state_dict(), tmp_path / "adam.pt")
    whole = read(tmp_path / "adam.pt", model).diagonal
    assert torch.equal(read(tmp_path / "adam.pt", model, params=r"^2\.").diagonal, whole[16:])


def test_other_settings_than_those_of_the_file_are_remarked_on(tmp_path: Path) -> None:
    model = network()
    torch.save(trained(model).state_dict(), tmp_path / "adam.pt")
    (remark,) = read(tmp_path / "adam.pt", model, betas=(0.9, 0.999)).remarks
    assert "(0.8, 0.95)" in remark


def test_a_parameter_that_was_never_updated_has_only_epsilon(tmp_path: Path) -> None:
    model = network()
    state = trained(model, named=True).state_dict()
    del state["state"][1]
    torch.save(state, tmp_path / "adam.pt")
    found = read(tmp_path / "adam.pt", model)
    assert torch.equal(found.diagonal[12:16], torch.full((4,), EPS, dtype=torch.float64))
    assert found.collapsed == pytest.approx(4 / 26)


def broken(tmp_path: Path, case: str) -> Path:
    path = tmp_path / "state.pt"
    state = trained(network()).state_dict()
    if case == "missing":
        return path
    if case == "text":
        path.write_text("not a pickle")
    elif case == "code":
        torch.save(network(), path)
    elif case == "model":
        torch.save(network().state_dict(), path)
    elif case == "sgd":
        torch.save(torch.optim.SGD(network().parameters(), lr=0.1).state_dict(), path)
    elif case == "other":
        torch.save(trained(nn.Sequential(nn.Linear(3, 2).double())).state_dict(), path)
    elif case == "shape":
        torch.save(trained(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double()).state_dict(), path)
    elif case == "no step":
        for entry in state["state"].values():
            entry["step"].zero_()
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "no such file"),
        ("text", "cannot be loaded as plain tensors"),
        ("code", "cannot be loaded as plain tensors"),
        ("model", "no optimizer state dict"),
        ("sgd", "not Adam"),
        ("other", "holds 2 parameters and the problem varies 4"),
        ("shape", "has shape"),
        ("no step", "no step yet"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_paragraph(tmp_path: Path, case: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        read(broken(tmp_path, case), network())
    assert "\n" not in str(refusal.value)
    assert "xpected" in str(refusal.value) or "Save" in str(refusal.value)
