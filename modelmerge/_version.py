"""The version, in the one place that packaging and the Hub's user agent read."""

__version__ = "0.1.0"
