"""Passwords and keys in texts: one list for configs, which refuse them, and launch scripts, which print *** instead.

    python3 -I moe_dist/redact.py WORD...      prints the words without them, each ended by a NUL byte

Imports the standard library alone, since launch scripts run it with any Python 3.
"""

import re
import sys

_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|passwd|pwd|secret|credentials?|auth|authorization|bearer"
    r"|(?:api|access|account|auth|client|deploy|encryption|license|master|private|secret|session|signing|storage|wandb)"
    r"[_-]?key(?:[_-]?id)?|(?:access|api|auth|bearer|bot|client|csrf|deploy|hf|hub|id|oauth|refresh|security|session|wandb)"
    r"[_-]?token)"
)
_IN_QUERY = r"[\w.-]*(?:token|key|keyid|sig|signature|pass|pw|code)|x-(?:amz|goog|ms)-[\w-]+|sas"
_PREFIXES = (  # of what services give out, and what follows
    r"hf_[A-Za-z0-9]{16,}", r"api_org_[A-Za-z0-9]{16,}", r"gh[a-z]_[A-Za-z0-9]{16,}", r"github_pat_\w{16,}",
    r"gl(?:agent|cbt|dt|ft|imt|oas|pat|ptt|rt|soat)-[\w-]{16,}", r"sk-[\w-]{16,}", r"[rs]k_(?:live|test)_\w{10,}",
    r"wandb_v\d_\w{16,}", r"xox[a-z]-[\w-]{10,}", r"xapp-[\w-]{10,}", r"AIza[\w-]{30,}",
    r"ya29\.[\w-]{16,}", r"GOCSPX-[\w-]{16,}",
    r"(?:AKIA|ABIA|ACCA)[A-Z0-9]{16,}", r"ASIA(?=[A-Z]*\d)[A-Z0-9]{16,}", r"npm_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}",
    r"pypi-(?:AgE[\w-]{16,}|[\w-]{40,})", r"do[opr]_v1_[a-f0-9]{32,}", r"dckr_(?:pat|oat)_[\w-]{16,}",
    r"dapi[a-f0-9]{32}",
    r"hv[bs]\.[\w-]{16,}", r"SG\.[\w-]{16,}\.[\w-]{16,}", r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}", r"nvapi-[\w-]{16,}",
    r"gsk_[A-Za-z0-9]{20,}", r"r8_[A-Za-z0-9]{20,}", r"ATATT3[\w=-]{16,}", r"lin_api_[A-Za-z0-9]{16,}",
    r"eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?",  # a JSON web token
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*",
)  # fmt: skip
# 40 random characters of base64 have about 26 runs of one kind, all of them short; a path as long has fewer, or words
_RANDOM = r"(?=(?:[a-z]+(?![a-z])|[A-Z]+(?![A-Z])|[0-9]+(?![0-9])|[+/]+(?![+/])){16})(?![A-Za-z0-9+/]*[a-z]{6})"
# group 1 of each stays
_SECRETS = [
    re.compile(pattern, flags)
    for pattern, flags in (
        # user:password@ of a URL, whatever is in the password; and a token alone, as web servers take it
        (r"(://)[^\s/@?#:]*:(?!\d+(?:[/?#]|$))[^\s@]{1,1000}(?:@[^\s/@]*)*(?=@)", 0),
        (r"(\bhttps?://)[^\s/@?#:]+(?=@)", re.IGNORECASE),
        (rf"((?<![\w.-])(?:{_NAME})(?:\s*=\s*|[\"']\s*:\s*|\s*:\s+))[^&]+", re.IGNORECASE),
        (rf"([?&;](?:{_IN_QUERY})=)[^&\s]+", re.IGNORECASE),
        (r"(hooks\.slack\.com/services/)[\w/]+", re.IGNORECASE),
        (r"(\b(?:Bearer|Basic)(?:\s+|%20))(?=\S*\d|\S{16})[\w.~+/=-]{8,}", re.IGNORECASE),
        (rf"((?<![A-Za-z0-9_])(?:local-)?)(?:{'|'.join(_PREFIXES)})", re.DOTALL),
        # wandb's; a folder of a snapshot or a commit has the same form, so that in a path it is none
        (r"((?:^|[\s=:,\"'])(?:local-)?)(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{40}(?=$|[\s,\"'&])", 0),
        (rf"((?<![\w+/.-])){_RANDOM}[A-Za-z0-9+/]{{40}}(?![\w+/=.-])", 0),  # the secret half of AWS's
    )
]


def redacted(text: str, shown: str = "***") -> str:
    """Returns the text with `shown` in place of every password and key."""
    for secret in _SECRETS:
        text = secret.sub(rf"\g<1>{shown}", text)
    return text


def has_secret(text: str) -> bool:
    """Returns whether the text has what looks like a password or a key."""
    return redacted(text) != text


if __name__ == "__main__":
    sys.stdout.buffer.write(
        b"".join(redacted(word).encode("utf-8", "surrogateescape") + b"\0" for word in sys.argv[1:])
    )
