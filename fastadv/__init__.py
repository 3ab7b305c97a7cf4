"""fastadv: fast, exact attacks and adversarial transfer learning on PyTorch."""

__version__ = "0.1.0"
