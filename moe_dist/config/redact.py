"""Patterns for passwords and keys: configs refuse them, launch scripts print *** in their place.

    python3 -I moe_dist/config/redact.py WORD...    prints the words with ***, each followed by NUL

This module imports only the standard library, because launch scripts run it with any Python 3.
"""

import re
import sys

# Names whose values are always secrets. Those in _WORD also occur in ordinary text.
_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|passcode|passwd|pwd"
    r"|(?:api|access|account|auth|client|deploy|encryption|license|master|private|secret|session|signing|storage|wandb)"
    r"[_-]?key(?:[_-]?id)?|(?:access|api|auth|bearer|bot|client|csrf|deploy|hf|hub|id|oauth|refresh|security|session|wandb)"
    r"[_-]?token)"
)
_WORD = r"[\w.-]*(?:secret|credentials?|auth|authorization|bearer)"
_KINDS = r"(?:token|pass|sig|signature)"
# Names whose values may be no secret: a number of tokens or passes, a padding token, a path's part.
_PERHAPS = (
    rf"(?:(?![\w.-]*(?:bos|cls|end|eos|image|mask|pad|sep|special|start|stop|unk)[_.-]token)[\w.-]*[_.-]{_KINDS}"
    rf"|(?:db|ftp|my|pg|root|smtp|user)pass|{_KINDS}(?=\s*=\s*\S*(?:\d|(?-i:[a-z][A-Z]))))"
)
_NOT_SECRET = (
    r"[\d.]{1,8}(?![^\s&/;,])|[<\[]|(?:true|false|none|null|auto)\b"
    r"|(?:\w{1,3}|[a-z]{1,12})/(?:[\w=.-]+/)*(?:[\w*=-]*[.*][\w.*]*)?(?![^\s&;,])"
)
# A folder that is named by a column and its value: /data/secret=1/x.parquet
_PARTITION = r"(?<=/)(?![\w.-]+=(?:\d{1,8}(?:/|$)|[a-z]{1,12}/))"
_IN_QUERY = r"[\w.-]*(?:token|key|keyid|sig|signature|pass|pw|code)|x-(?:amz|goog|ms)-[\w-]+|sas"
_PREFIXES = (  # prefixes of the keys of known services, and the characters that follow
    r"hf_[A-Za-z0-9]{16,}",
    r"api_org_[A-Za-z0-9]{16,}",
    r"gh[a-z]_[A-Za-z0-9]{16,}",
    r"github_pat_\w{16,}",
    r"gl(?:agent|cbt|dt|ft|imt|oas|pat|ptt|rt|soat)-[\w-]{16,}",
    r"sk-(?:proj|ant|or|svcacct|admin|lf|live|test)-[\w-]{16,}",
    r"sk-(?![\w-]*(?<=[_-])[a-z]{4,12}(?![A-Za-z0-9]))[\w-]{16,}",  # no file name with hyphens
    r"[rs]k_(?:live|test)_\w{10,}",
    r"whsec_[A-Za-z0-9+/=]{16,}",
    r"tskey-[a-z]+-[\w-]{10,}",
    r"sbp_[a-f0-9]{32,}",
    r"sb_secret_[\w-]{16,}",
    r"glsa_\w{20,}",
    r"key-(?=[a-z]*\d)[a-z0-9]{32}(?![\w-])",
    r"wandb_v\d_\w{16,}",
    r"xox[a-z]-[\w-]{10,}",
    r"xapp-[\w-]{10,}",
    r"AIza[\w-]{30,}",
    r"ya29\.[\w-]{16,}",
    r"GOCSPX-[\w-]{16,}",
    r"(?:AKIA|ABIA|ACCA)[A-Z0-9]{16,}",
    r"ASIA(?=[A-Z]*\d)[A-Z0-9]{16,}",
    r"(?<!/)ASIA[A-Z]{16}(?![\w/.*])",  # not a folder in capitals
    r"npm_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}",
    r"pypi-(?:AgE[\w-]{16,}|[\w-]{40,})",
    r"do[opr]_v1_[a-f0-9]{32,}",
    r"dckr_(?:pat|oat)_[\w-]{16,}",
    r"dapi[a-f0-9]{32}",
    r"hv[bs]\.[\w-]{16,}",
    r"SG\.[\w-]{16,}\.[\w-]{16,}",
    r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}",
    r"nvapi-[\w-]{16,}",
    r"gsk_[A-Za-z0-9]{20,}",
    r"(?:xai|pplx)-[A-Za-z0-9]{20,}",
    r"r8_[A-Za-z0-9]{20,}",
    r"ATATT3[\w=-]{16,}",
    r"lin_api_[A-Za-z0-9]{16,}",
    r"eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?",  # a JSON web token
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*",
)
# 40 random characters of base64 have about 26 short runs of one kind; a path of this length has
# fewer runs, or words.
_RUNS = (
    r"(?=(?:[a-z]+(?![a-z])|[A-Z]+(?![A-Z])|[0-9]+(?![0-9])|[+/]+(?![+/])){%d})"
    r"(?![A-Za-z0-9+/]*[a-z]{%d})"
)
_ENDS = r"(?=\s*(?:$|[,;&\"'})\]]))"
# Group 1 of a match is kept, the rest is replaced.
_SECRETS = [
    re.compile(pattern, flags)
    for pattern, flags in (
        # user:password@ in a URL, with any characters in the password; or a token alone
        (
            r"(://)[^\s/@?#:]*:(?!\s|\d+(?:[/?#\s]|$))(?:[^\s@]{1,1000}(?:@[^\s/@]*)*|[^/@]{1,100})(?=@)",
            0,
        ),
        (r"(\bhttps?://)[^\s/@?#:]+(?=@)", re.IGNORECASE),
        (
            rf"((?:(?<![\w./-])|{_PARTITION})(?:{_NAME}|{_WORD})(?:\s*=\s*|[\"']\s*:\s*))[^&]+",
            re.IGNORECASE,
        ),
        (rf"((?<![\w./-]){_NAME}\s*:\s+)[^&]+", re.IGNORECASE),
        (rf"((?<![\w.-])(?i:{_PERHAPS})\s*=\s*)(?i:(?!{_NOT_SECRET}))[^\s&]{{4,}}", 0),
        (
            r"((?<![\w./-])(?:deploy|job|private)-token\s*:\s*)\S{6,}",
            re.IGNORECASE,
        ),  # HTTP headers
        (rf"((?<![\w./-]){_KINDS}\s*:\s*)(?=\S*\d)(?=\S*[a-z])\S{{8,}}", re.IGNORECASE),
        # a word with a digit after a colon, or the last word; not "auth: the first gate", "auth:v1"
        (
            rf"((?<![\w./-])(?![\w.-]*auth\s*:)(?:{_NAME}|{_WORD})\s*:\s*)(?=\S*\d|\S+{_ENDS})[^\s&]+",
            re.IGNORECASE,
        ),
        (
            r"((?<![\w./-])[\w.-]*auth(?:orization)?\s*:\s+)"
            r"(?=(?:Bearer|Basic|Digest|Token)\s|(?=\S*\d)\S{8}|\S+:\S)[^&]+",
            re.IGNORECASE,
        ),
        (rf"([?&;](?:{_IN_QUERY})=)[^&\s]+", re.IGNORECASE),
        (r"(hooks\.slack\.com/services/|/api/webhooks/\d+/)[\w/-]+", re.IGNORECASE),
        (r"(\bBearer(?:\s+|%20))(?=\S*\d|\S{16})[\w.~+/=-]{8,}", re.IGNORECASE),
        (rf"(\b[Bb]asic(?:\s+|%20)){_RUNS % (5, 8)}[A-Za-z0-9+/]{{8,}}={{0,2}}(?![\w/.*-])", 0),
        (rf"((?<![A-Za-z0-9_])(?:local-)?)(?:{'|'.join(_PREFIXES)})", re.DOTALL),
        # a wandb key; in a path, 40 hex digits are a snapshot or a commit
        (
            r"((?:^|[\s=:,\"'])(?:local-)?)(?<!commit.)(?<!head.)(?<!rev.)(?<!sha.)(?<!git.)(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{40}(?=$|[\s,\"'&])",
            0,
        ),
        (
            rf"((?<![\w+/.-])){_RUNS % (16, 6)}[A-Za-z0-9+/]{{40}}(?![\w+/=.-])",
            0,
        ),  # an AWS key's secret part
    )
]


def redact(text: str, placeholder: str = "***") -> str:
    """Replaces every password and key in a text by `placeholder`."""
    for secret in _SECRETS:
        text = secret.sub(rf"\g<1>{placeholder}", text)
    return text


def has_secret(text: str) -> bool:
    """Returns True if a text contains something that looks like a password or a key."""
    return redact(text) != text


if __name__ == "__main__":
    sys.stdout.buffer.write(
        b"".join(redact(word).encode("utf-8", "surrogateescape") + b"\0" for word in sys.argv[1:])
    )
