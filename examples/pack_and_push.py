"""Pack a trained adapter, push it to a Hub, pull it back: python examples/pack_and_push.py FOLDER REPO [BASE].

Set HF_ENDPOINT and HF_TOKEN for a Hub of your own (adapterhub hub serve); without them it is huggingface.co.
"""

import sys

import adapterhub

folder, repo, base = (*sys.argv[1:], "smollm2-135m-instruct")[:3]

# Chat template, recorded probe, model card, digests; the manifest is written last.
adapter = adapterhub.pack(folder, base=base)
print(f"packed {adapter.manifest.name}: {adapter.digest}")

hub = adapterhub.Hub()
commit = hub.push(adapter, repo)
print(f"pushed to {hub.endpoint}/{repo} at {commit[:12]}")

# What arrives is what was packed: the digest covers every file and the identity of the base.
pulled = adapterhub.Registry().pull(f"{repo}@{commit}", hub)
assert pulled.digest == adapter.digest
print(f"pulled and verified: {pulled.path}")
