"""Optimizers for adapters: LoRA+, LoRA-FA, Riemannian preconditioning."""
