"""Pretraining of the Latent Recurrent Transformer in JAX and Flax."""
