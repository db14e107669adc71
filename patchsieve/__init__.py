"""Export, compile and run vision-language models whose visual tokens are pruned in the decoder.

model = patchsieve.load("bundle")
print(model.generate("photo.jpg", "What is in the image?").text)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchsieve.runtime.model import Model

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parents[1]
if (
    _CHECKOUT / "setup.py"
).is_file():  # not installed: export/, runtime/ ... lie beside this folder
    __path__.append(str(_CHECKOUT))


def load(bundle: str | Path, **options: Any) -> Model:
    """Load a bundle; the options are those of `patchsieve.runtime.model.Model`."""
    from patchsieve.runtime.model import Model

    return Model(bundle, **options)
