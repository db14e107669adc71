"""Export, compile and run vision-language models whose visual tokens are pruned in the decoder."""

from pathlib import Path

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parents[1]
if (
    _CHECKOUT / "setup.py"
).is_file():  # not installed: export/, runtime/ ... lie beside this folder
    __path__.append(str(_CHECKOUT))
