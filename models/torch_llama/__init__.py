"""Llama in torch: the network on CPU and CUDA."""
