"""One thread for every test and for the programs that tests start: the kernels are small."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
