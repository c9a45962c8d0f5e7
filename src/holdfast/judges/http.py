"""One POST to a judge's server, with what a paid and busy server asks of a client: patience, and no retry of a mistake.

Standard library only. Redirects are not followed, so a key is never sent to another host.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ConfigError, JudgeError

# Worth another try: the request was fine, the server was not ready for it.
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# The configuration is wrong; no sample will fare better.
FATAL = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
# No credit: waiting does not help, paying does.
UNPAID = 402
_BODY_LIMIT = 8_000_000


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """attempts: requests per sample at most. first_wait_s doubles after each failure up to max_wait_s; a server's
    Retry-After is obeyed instead, up to max_wait_s. timeout_s: for one request, connection and answer together."""

    attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 120.0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait_s < 0 or self.max_wait_s < 0 or self.timeout_s <= 0:
            raise ConfigError(
                f"attempts {self.attempts} (>= 1), first_wait_s {self.first_wait_s}, max_wait_s {self.max_wait_s} "
                f"(>= 0) and timeout_s {self.timeout_s} (> 0) are out of range."
            )


class RefusedSample(Exception):  # noqa: N818  (an outcome of one sample, never an error that a user sees)
    """The server answered, and will not judge this sample (too long, filtered): the next one may fare better."""


class FilteredSample(RefusedSample):
    """A content filter, the server's or the judge's own, stops this sample: it is one unscored reply and no more."""


class Unanswered(Exception):  # noqa: N818
    """No usable answer after every attempt. reached: the server was there, but slow, busy or talking nonsense."""

    def __init__(self, cause: str, *, reached: bool) -> None:
        super().__init__(cause)
        self.reached = reached


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class JsonClient:
    """Posts JSON to one URL. The key stands in the request's header and nowhere else: not in errors, not in repr."""

    def __init__(
        self, url: str, *, api_key: str | None, policy: RetryPolicy, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url {url!r} is no web address; expected http://... or https://...")
        if "@" in url.split("://", 1)[1].split("/", 1)[0]:
            # An address is recorded and shown in errors; a password in it would be too.
            raise ConfigError("The judge's url holds a user name or password; give a key through api_key_env.")
        self.url = url
        self.policy = policy
        self.requests_sent = 0
        self._key = api_key
        self._sleep = sleep
        self._opener = urllib.request.build_opener(_NoRedirect)
        # Seeded, and never a source of results: it only spreads the retries of several workers.
        self._jitter = random.Random(0)

    def __repr__(self) -> str:
        return f"JsonClient({self.url!r})"

    def post(self, body: Mapping[str, Any], read: Callable[[Any], str]) -> str:
        """What `read` takes out of the server's JSON answer; a ValueError of `read` counts as a malformed answer.

        Raises: JudgeError: the configuration is wrong. RefusedSample: this request is refused. Unanswered: all
            attempts failed.
        """
        cause, reached = "", False
        for attempt in range(self.policy.attempts):
            wait = min(self.policy.max_wait_s, self.policy.first_wait_s * 2**attempt) * self._jitter.uniform(0.8, 1.0)
            try:
                return read(self._once(body))
            except urllib.error.HTTPError as error:
                cause, wait = self._after_status(error, wait)
                reached = True
            except TimeoutError:
                cause, reached = f"no answer within {self.policy.timeout_s:g} s", True
            except urllib.error.URLError as error:
                if isinstance(error.reason, TimeoutError):
                    cause = f"no connection within {self.policy.timeout_s:g} s"
                else:
                    cause = f"no connection: {error.reason}"
            except (http.client.HTTPException, ConnectionError) as error:
                cause = f"the connection broke: {error or type(error).__name__}"
            except ValueError as error:
                cause, reached = f"malformed answer: {error}", True
            if attempt + 1 < self.policy.attempts:
                self._sleep(wait)
        raise Unanswered(self.scrub(f"{cause} ({self.policy.attempts} attempt(s))"), reached=reached)

    def scrub(self, text: str) -> str:
        """`text` without the key: a server may echo what it was sent."""
        return text.replace(self._key, "[key]") if self._key else text

    def _once(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "holdfast"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=json.dumps(body).encode(), headers=headers, method="POST")
        self.requests_sent += 1
        with self._opener.open(request, timeout=self.policy.timeout_s) as response:
            raw = response.read(_BODY_LIMIT)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f"not JSON: {raw[:80]!r}") from None

    def _after_status(self, error: urllib.error.HTTPError, wait: float) -> tuple[str, float]:
        """Cause and wait of a status worth a retry; raises for the others."""
        status, said = error.code, self.scrub(_said(error))
        if status == UNPAID or (status in (403, 429) and _QUOTA.search(said)):
            raise JudgeError(
                f"{self.url} answers {status}{said}: the account has no credit or quota left. What was answered before "
                "is kept; run the same command again when it has."
            ) from None
        if status in (400, 403, 422, 451) and _FILTER.search(said):
            raise FilteredSample(f"a content filter of the server answers {status}{said}") from None
        if status in FATAL:
            raise JudgeError(
                f"{self.url} answers {status}{said}. Check the judge's url (it ends in /v1 for most servers), its "
                "model and the environment variable that holds its key."
            ) from None
        if status not in RETRIED:
            raise RefusedSample(f"the server answers {status}{said}") from None
        asked = _retry_after(error.headers.get("Retry-After"))
        return f"the server answers {status}{said}", wait if asked is None else min(asked, self.policy.max_wait_s)


# Exhausted for good, unlike a rate limit that a minute mends.
_QUOTA = re.compile(
    r"insufficient[_ ](?:quota|credits?|balance|funds)|exceeded your current quota|billing|out of credits|"
    r"credit balance|"
    r"quota (?:is |has been )?exhausted|exhausted your|payment required|no credits|(?:spending|usage|"
    r"monthly) (?:limit|cap)|arrears",
    re.IGNORECASE,
)
_FILTER = re.compile(
    r"content[_ -]?(?:filter|policy|management|moderation|safety)|contentfilter|responsible ?ai|flagged|moderation|"
    r"safety[_ -](?:filter|system|settings|policy)|prohibited[_ ]content|violat\w+ [^.]{0,40}polic|"
    r"invalid_prompt|inappropriate content|"
    r"data_?inspection|sensitive (?:content|words)|blocked by",
    re.IGNORECASE,
)


def _said(error: urllib.error.HTTPError) -> str:
    try:
        raw = error.read(2000)
    except (OSError, http.client.HTTPException):
        return ""
    text = " ".join(raw.decode("utf-8", "replace").split())
    return f" ({text[:200]})" if text else ""


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or an HTTP date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, moment.timestamp() - time.time())
