"""Functions that the documentation gives as examples."""

import re
from pathlib import Path
from typing import Any

from rollcast.comm import Holding

TEXT = (Path(__file__).parents[2] / "docs" / "sharded-trainers.md").read_text()


def example(name: str, function: str) -> Any:
    """The function that a code block of docs/sharded-trainers.md defines."""
    (code,) = re.findall(rf"```python {name}\n(.*?)```", TEXT, re.DOTALL)
    scope: dict[str, Any] = {"Holding": Holding}
    exec(code, scope)
    return scope[function]
