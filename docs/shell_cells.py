"""``%%bash`` of the notebooks, read by IPython when it starts: ends at an error, shows its output in one piece."""

import subprocess

from IPython.core.magic import register_cell_magic


@register_cell_magic
def bash(line: str, cell: str) -> None:
    """Run a cell in bash."""
    command = ["bash", "-euo", "pipefail", "-c", cell]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    done.check_returncode()
