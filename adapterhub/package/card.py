"""The model card (README.md) of an adapter, written from its manifest.

Front matter as the Hub reads it: https://huggingface.co/docs/hub/model-cards, Jinja-free on purpose.
"""

from __future__ import annotations

import yaml

from adapterhub.package.manifest import Manifest
from adapterhub.package.run_record import REPORT_NAME
from adapterhub.units import format_duration


def render(manifest: Manifest) -> str:
    """Return the text of README.md."""
    return f"---\n{_front_matter(manifest)}---\n\n{_body(manifest)}"


def _front_matter(manifest: Manifest) -> str:
    fields = {
        "base_model": manifest.base.id,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": manifest.license,
        "tags": ["lora", "adapterhub", f"base_model:adapter:{manifest.base.id}"],
    }
    known = {key: value for key, value in fields.items() if value is not None}
    return str(yaml.safe_dump(known, sort_keys=False, allow_unicode=True))


def _body(manifest: Manifest) -> str:
    base, lora = manifest.base, manifest.lora
    weights = base.quantization
    trained_on = f"{weights.weights}, compute {weights.compute_dtype}" if weights else "not recorded"
    lines = [
        f"# {manifest.name}",
        "",
        f"A LoRA adapter for [{base.id}](https://huggingface.co/{base.id}), packed by adapterhub.",
        "",
        "| | |",
        "|---|---|",
        f"| base revision | `{base.revision or 'not recorded'}` |",
        f"| base fingerprint | `{base.fingerprint}` |",
        f"| base in training | {trained_on} |",
        f"| method | {lora.method}, rank {lora.rank}, alpha {lora.alpha:g} |",
        f"| targets | {', '.join(lora.targets)} |",
        f"| digest | `{manifest.digest}` |",
    ]
    if manifest.evaluations:
        lines += [
            "",
            "## Held-out loss (nats per token)",
            "",
            "| data | tokens | base | adapter |",
            "|---|---|---|---|",
        ]
        lines += [f"| {e.data} | {e.tokens} | {e.base_loss:.3f} | {e.adapter_loss:.3f} |" for e in manifest.evaluations]
    if manifest.training:
        run = manifest.training
        lines += [
            "",
            "## Training",
            "",
            f"{run.samples} samples, {run.steps} steps, {run.trained_tokens:,} trained tokens, "
            f"{format_duration(run.seconds)}, seed {run.seed}; recipe.toml and train_log.jsonl are the full record.",
        ]
        if REPORT_NAME in manifest.files:
            lines += ["", f"[{REPORT_NAME}]({REPORT_NAME}): loss curves, answers, masks, memory, environment."]
    lines += [
        "",
        "## Use",
        "",
        "```bash",
        f"adapterhub pull OWNER/{manifest.name}",
        f"adapterhub serve --base {base.id} --adapter {manifest.name}=OWNER/{manifest.name}",
        "```",
        "",
        'It is a plain PEFT folder too: `PeftModel.from_pretrained(base, "OWNER/' + manifest.name + '")`.',
    ]
    return "\n".join(lines) + "\n"
