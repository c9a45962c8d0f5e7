"""Caption metrics of COCO through pycocoevalcap: BLEU-1..4, METEOR, ROUGE-L and CIDEr. Figures of a corpus.

METEOR and the Penn Treebank tokeniser are Java programs (shipped inside pycocoevalcap). Without Java METEOR is missing,
the others are computed on an approximate tokenisation, and there is no task score: a mean over fewer metrics would look
like the published one and not be it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from holdfast.errors import ConfigError
from holdfast.scorers.base import Missing, Mode, Score
from holdfast.scorers.sample import NO_GOLD, check_lengths

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
_JAVA_TIMEOUT_S = 1800
_NOTE = (
    "CIDEr's document frequencies come from the evaluated set: a subset's figures do not compare with the full set's"
)

_APPROXIMATE_TOKEN = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't)|\w+(?:[-./]\w+)*|[^\s\w]")


class Captions:
    """Mean of the seven COCO caption metrics over the corpus (UCIT's VizWiz-Caption and Flickr30k score).

    Both modes compute the same. The value is the plain mean of METRICS, each as a fraction; CIDEr may exceed 1, and so
    may the value. It is None when a metric is missing; `figures["missing"]` then names it and `figures["reason"]` why.
    """

    name: ClassVar[str] = "captions"

    def __init__(self, *, mode: Mode = "strict", java: str = "java") -> None:
        self.mode: Mode = mode
        self.java = shutil.which(java)
        try:
            import pycocoevalcap  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "scorer 'captions' needs pycocoevalcap; install it with: pip install 'holdfast[captions]'."
            ) from error

    @property
    def missing(self) -> Missing:
        """What an image without a caption is worth: the corpus is scored as a whole."""
        return "an empty caption"

    def score(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any] | None = None) -> Score:
        """No value: caption metrics are defined on a corpus (use `aggregate`)."""
        del prediction, meta
        return Score(value=None, evidence="corpus metric" if references else NO_GOLD)

    def aggregate(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        metas: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[float | None, list[Score], dict[str, Any]]:
        """(mean of the seven or None, one valueless Score per sample, {"metrics", "missing", "reason", ...})."""
        check_lengths(predictions, references, metas)
        kept = [i for i, golds in enumerate(references) if golds]
        figures: dict[str, Any] = {"n": len(predictions), "scored": len(kept), "unscored": len(predictions) - len(kept)}
        scores = [Score(value=None, evidence="corpus metric" if golds else NO_GOLD) for golds in references]
        if not kept:
            return None, scores, figures | {"metrics": {}, "missing": list(METRICS), "reason": "no sample to score"}
        hypotheses, golds, tokenizer, problem = self._tokenize(
            [predictions[i] for i in kept], [list(references[i]) for i in kept]
        )
        metrics, per_sample = _ngram_metrics(hypotheses, golds)
        reasons = [problem] if problem else []
        if self.java is None:
            reasons = ["METEOR and the Penn Treebank tokeniser need a Java runtime, and none is on the PATH"]
        else:
            try:
                metrics["METEOR"] = _meteor(self.java, hypotheses, golds)
            except (OSError, ValueError) as error:
                reasons.append(f"METEOR failed: {error}")
        missing = [name for name in METRICS if name not in metrics]
        if tokenizer != "ptb":
            # Figures on another tokenisation are shown, and never averaged into the published score.
            missing = missing or list(METRICS)
        for place, index in enumerate(kept):
            detail = ", ".join(f"{name} {values[place]:.3f}" for name, values in per_sample.items())
            scores[index] = Score(value=None, evidence=f"corpus metric; this caption alone: {detail}")
        figures |= {
            "metrics": {name: metrics[name] for name in METRICS if name in metrics},
            "missing": missing,
            "reason": "; ".join(reasons),
            "tokenizer": tokenizer,
            "note": _NOTE,
        }
        value = sum(metrics[name] for name in METRICS) / len(METRICS) if not missing else None
        return value, scores, figures

    def _tokenize(
        self, predictions: list[str], references: list[list[str]]
    ) -> tuple[list[str], list[list[str]], str, str]:
        """Tokenised hypotheses and references, the tokeniser's name, and the problem that kept Java from it."""
        flat = predictions + [gold for golds in references for gold in golds]
        # One line per caption: any other line break would shift every caption after it.
        flat = [" ".join(text.replace("|||", " ").split()) for text in flat]
        problem, tokenizer = "", "ptb"
        try:
            lines = _ptb(self.java, flat) if self.java else None
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            problem, lines = f"the Penn Treebank tokeniser failed: {error}", None
        if lines is None:
            tokenizer, lines = "approximate", [" ".join(_APPROXIMATE_TOKEN.findall(text.lower())) for text in flat]
        from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

        clean = [" ".join(token for token in line.split() if token not in PUNCTUATIONS) for line in lines]
        rest = iter(clean[len(predictions) :])
        return clean[: len(predictions)], [[next(rest) for _ in golds] for golds in references], tokenizer, problem


def _ngram_metrics(
    hypotheses: list[str], references: list[list[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """BLEU-1..4, ROUGE-L and CIDEr of tokenised captions, and the values of single captions."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    res = {i: [text] for i, text in enumerate(hypotheses)}
    gts = dict(enumerate(references))
    bleu, bleu_each = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouge_each = Rouge().compute_score(gts, res)
    cider, cider_each = Cider().compute_score(gts, res)
    metrics = {f"Bleu_{n + 1}": float(value) for n, value in enumerate(bleu)}
    metrics |= {"ROUGE_L": float(rouge), "CIDEr": float(cider)}
    each = {"Bleu_4": bleu_each[3], "ROUGE_L": rouge_each, "CIDEr": cider_each}
    return metrics, {name: [float(value) for value in values] for name, values in each.items()}


def _ptb(java: str, lines: list[str]) -> list[str]:
    """Each line as Stanford's PTB tokeniser splits it, lower-cased. Raises ValueError when lines went astray."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = [java, "-Dfile.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # The package writes a temporary file beside its jar, which fails in a read-only environment; stdin does not.
    done = subprocess.run(
        command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True, timeout=_JAVA_TIMEOUT_S
    )
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip()[-300:] or f"exit code {done.returncode}")
    found = done.stdout.decode().split("\n")[:-1]
    if len(found) != len(lines):
        raise ValueError(f"{len(found)} lines came back for {len(lines)} captions")
    return found


def _meteor(java: str, hypotheses: list[str], references: list[list[str]]) -> float:
    """Corpus METEOR 1.5. Raises OSError or ValueError when the program fails."""
    from pycocoevalcap.meteor import meteor

    folder = Path(meteor.__file__).parent
    command = [
        java,
        "-Dfile.encoding=UTF-8",
        "-jar",
        "-Xmx2G",
        meteor.METEOR_JAR,
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    # stderr is dropped: unread, a full pipe would stop the program for good.
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin and process.stdout
        try:
            statistics = []
            for hypothesis, golds in zip(hypotheses, references, strict=True):
                request = " ||| ".join(["SCORE", *golds, hypothesis.replace("  ", " ")])
                statistics.append(_ask(process, request))
            process.stdin.write((" ||| ".join(["EVAL", *statistics]) + "\n").encode())
            process.stdin.flush()
            for _ in hypotheses:
                process.stdout.readline()  # each caption's own score
            answer = process.stdout.readline().decode().strip()
            return float(answer)
        finally:
            process.kill()


def _ask(process: subprocess.Popen[bytes], request: str) -> str:
    assert process.stdin and process.stdout
    process.stdin.write(f"{request}\n".encode())
    process.stdin.flush()
    answer = process.stdout.readline().decode().strip()
    if not answer:
        raise ValueError(f"no answer to {request[:80]!r}")
    return answer
