"""What to say where an optional dependency is not installed."""


def install(extra: str) -> str:
    """How to install an extra of `setup.cfg`: from a package, and in a checkout.

    >>> print(install("hf"))
    pip install 'pennylane-qattn[hf]', or in a checkout: bash scripts/environment.sh hf
    """
    return f"pip install 'pennylane-qattn[{extra}]', or in a checkout: bash scripts/environment.sh {extra}"
