"""CHELA: short-long convolutions with hardware-efficient linear attention, for long sequences."""

__version__ = "0.1.0"
