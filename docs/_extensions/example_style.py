"""What the pictures of the gallery look like; sets it before every example."""

import matplotlib


def set_style(gallery_conf: dict, name: str) -> None:
    """A reset function of sphinx-gallery."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
        {
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.figsize": (7, 4),
            "font.size": 10,
            "legend.frameon": False,
        }
    )
