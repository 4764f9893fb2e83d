"""The command `gift`: every command parses, calls one function of the library, and prints."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from gift.checkpoints import convert_checkpoint


def convert(checkpoint: Path, out: Path) -> None:
    """Turn a checkpoint of the original authors into an adapter folder, e.g. `gift convert Flowers.pth.tar flowers`.

    The folder is loaded with `import gift` and `PeftModel.from_pretrained(backbone, "flowers")`.

    Args:
        checkpoint: The authors' file, a pickle; nothing in it is executed.
        out: Folder to write; must not exist or be empty.
    """
    config = convert_checkpoint(checkpoint, out)
    targets = ", ".join(sorted(config.target_modules or ()))
    print(f"Wrote {out}: {config.generator} generator of rank {config.r} for {targets}.")
    print("What the file said of its model and training is in original.json there.")


COMMANDS: dict[str, Any] = {"convert": convert}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error in its input ends it with one line and exit code 2."""
    try:
        auto_cli(COMMANDS, args=arguments, prog="gift", as_positional=True)
    except (ValueError, OSError) as error:
        print(f"gift: {error}", file=sys.stderr)
        raise SystemExit(2) from error
