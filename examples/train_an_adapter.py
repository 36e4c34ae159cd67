"""Train a LoRA adapter from a shipped recipe and compare held-out losses.

Usage: python examples/train_an_adapter.py [BASE] [OUTPUT].
"""

import sys

import adapterhub

base = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
output = sys.argv[2] if len(sys.argv) > 2 else "captain"

# Data and masks are checked first, then the base is loaded in 4 bit. A stopped run resumes: adapterhub train --resume.
end = adapterhub.train("demo-captain", base=base, output=output)

for result in end.evaluations:
    print(f"{result.data}: held-out loss {result.base_loss:.3f} (base) -> {result.adapter_loss:.3f} (adapter)")
print(f"{end.steps} steps in {end.seconds:.0f} s, at most {end.peak_memory_bytes / 1e9:.1f} GB; adapter in {output}")
