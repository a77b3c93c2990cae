"""One thread per test process: tests are small, and several processes run them."""

import torch

torch.set_num_threads(1)
