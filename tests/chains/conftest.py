"""One thread per test process: pytest runs several, and small nets on shared cores only wait for each other."""

import torch

torch.set_num_threads(1)
