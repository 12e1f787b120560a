"""MLP-Mixer on Fashion-MNIST: the model, its training, the parameter grid and what is drawn from it."""
