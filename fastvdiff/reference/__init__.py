"""What each op means: plain differentiable PyTorch, importing torch only. Read here first."""
