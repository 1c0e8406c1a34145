"""`python benchmarks/settings_page.py > docs/settings.md`: the page of settings, made from the settings."""

from ddpm_ema.config.agreement import effects
from ddpm_ema.config.command_line import flat, kind, written
from ddpm_ema.config.settings import Config, sections

INTRODUCTION = """\
# Settings

Made from the code by `python benchmarks/settings_page.py > docs/settings.md`; do not edit it here.

In a file a setting is written as YAML (`training: {steps: 500}`), on the command line by its key path (`--training.steps 500`).
`...` is a list, on the command line several values. `null` is no value.
`SHARE%` is a share of `training.steps`, such as `5%`. A command line is laid over the file.

The last column says what depends on a setting:

- *free*: it may change at any time.
- *run*: it defines the training run, so that a resumed run must have the same value.
- *samples*: it changes the images sampled from given weights, so that another value makes another scoring; *run, samples*: scoring
  must also agree with training.
- *scores*: it changes the figures of given images, so that another value makes another scoring.
- *content*: what it points to is compared by fingerprint or sha256, not the setting itself.
"""


def page() -> str:
    """Markdown: a table per section."""
    defaults, marks = flat(Config()), dict(effects())
    parts = [INTRODUCTION.rstrip()]
    for path, about, own in sections():
        parts.append(f"\n## {path or 'The run'}\n\n{about}\n\n| setting | values | default | meaning | effect |")
        parts.append("|---|---|---|---|---|")
        for key, field in own.items():
            values = kind(field.annotation, field.metadata).replace("|", "\\|")
            effect = ", ".join(mark.name.lower() for mark in marks[key] if mark.name) or "free"
            meaning = " ".join(str(field.description).split()).replace("|", "\\|").replace("*", "\\*")
            parts.append(f"| `{key}` | {values} | {written(defaults[key])} | {meaning} | {effect} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
