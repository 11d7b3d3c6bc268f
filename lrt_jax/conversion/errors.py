"""The error of weights from elsewhere."""

from lrt_jax.setup.errors import UserError


class ConversionError(UserError):
    """Arrays, or the config that came with them, do not fit; one sentence says which."""
