"""Share a trained model."""

import json
from dataclasses import dataclass
from pathlib import Path

from smallfry.cli._fields import option
from smallfry.cli._shared import AsJson, Licensed, OneRun
from smallfry.errors import UsageError
from smallfry.io.terminal import command, say


@dataclass(frozen=True, kw_only=True)
class Options(Licensed, AsJson, OneRun):
    """Share a trained model as a folder or on the Hugging Face Hub.

    Args:
        to: New folder.
        hub: Repository on the Hugging Face Hub, as USER/NAME.
        private: Make the repository private.
    """

    to: Path | None = option(metavar="FOLDER")
    hub: str | None = option(metavar="USER/NAME")
    private: bool = False

    def __post_init__(self) -> None:
        if (self.to is None) == (self.hub is None) or (self.private and self.hub is None):
            raise UsageError(
                "share needs either --to FOLDER, or --hub USER/NAME with an optional --private"
            )


def run(options: Options) -> int:
    """Write the folder or the repository, and print how to use it."""
    from smallfry.deploy.pretrained import load_trained, push_to_hub, save_pretrained

    checkpoint, license = options.checkpoint, options.license
    if options.hub is not None:
        name = timm_name = f"hf_hub:{options.hub}"
        where = push_to_hub(
            options.run,
            options.hub,
            checkpoint=checkpoint,
            license=license,
            private=options.private,
        )
    else:
        assert options.to is not None
        folder = save_pretrained(options.run, options.to, checkpoint=checkpoint, license=license)
        name = where = str(folder)
        timm_name = f"local-dir:{where}"
    compressed = bool(load_trained(options.run, checkpoint).spec.transforms)
    if options.json:
        say(json.dumps({"shared": where, "timm": None if compressed else timm_name}))
        return 0
    say(f"shared:  {where}\nuse it:  {command('smallfry', 'predict', name)} FILE…")
    if compressed:  # timm does not apply transforms
        say(f"or:      smallfry.load({name!r}).model")
    else:
        say(f"or:      timm.create_model({timm_name!r}, pretrained=True)")
    if license is None:
        say(
            "license: none, so others may not use the model; set one with, e.g., --license "
            "apache-2.0"
        )
    return 0
