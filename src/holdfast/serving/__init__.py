"""An OpenAI-compatible endpoint for edited checkpoints, adapters and CRAM folders: routed, bounded, drained.

One request passes through: `protocol` (what was asked, or an error in OpenAI's shape), an engine (`local`: transformers
with small dynamic batches; `remote`: a vLLM server behind the router), and `app` (HTTP). Needs the extra
`holdfast[serve]`; nothing else in holdfast imports this room.
"""
