"""No key of the environment, and none of the command line, gets into what a run keeps or says."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from processes import set_, start
from runs import TINY, tiny

from moe_dist.config.redact import has_secret, redact
from moe_dist.config.validate import check_config

KEYS = {
    "HF_TOKEN": "hf_" + "aB3" * 11,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "DATABASE_PASSWORD": "correct-horse",
}


@pytest.mark.timeout(120)
def test_keys_of_the_environment_are_nowhere(small_text: Path, tmp_path: Path) -> None:
    """In a run with wandb, its report, its record of calls, and the traceback of one that a bug has ended."""
    folder = tmp_path / "run"
    sets = set_(
        *TINY,
        "steps=2",
        "save_every=1",
        "write_report=true",
        "wandb.mode=offline",
        f"data.text={small_text}",
    )
    process = start("lstm_moe_demo", "--folder", str(folder), *sets, "--profile", **KEYS)
    said = "".join(process.communicate(timeout=100))
    assert process.returncode == 0, said
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = {path.relative_to(folder).parts[0] for path in kept}
    assert {"calls", "config.json", "metrics.jsonl", "report.html", "wandb", "checkpoints"} <= names
    for key in KEYS.values():
        assert key not in said and not [path for path, text in kept.items() if key.encode() in text]


X = "a1B2" * 9  # 36 characters that no service gave out
HEX = "0123456789abcdef" * 2 + "01234567"
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxIn0" + "." + X
MADE_UP = {  # a value of each kind -> what is printed in its place
    "https://me:pass@host/data": "https://***@host/data",
    "s3://key:secret@bucket/x": "s3://***@bucket/x",
    "https://me:pa/ss@host/data": "https://***@host/data",
    "postgres://me:p@s?#s@host:5432/x": "postgres://***@host:5432/x",
    "https://:pass@host": "https://***@host",
    f"https://{X}@host/x.git": "https://***@host/x.git",
    "https://host/data?access_token=0123": "https://host/data?access_token=***",
    "https://host/data?a=1&api_key=0123&b=2": "https://host/data?a=1&api_key=***&b=2",
    "s3://bucket/x?a=1&X-Amz-Signature=0123": "s3://bucket/x?a=1&X-Amz-Signature=***",
    "https://host/x?X-Goog-Signature=0123&b": "https://host/x?X-Goog-Signature=***&b",
    "https://x.blob.host/x?sv=1&sig=ab%2Fcd": "https://x.blob.host/x?sv=1&sig=***",
    "https://host/x?AWSAccessKeyId=ab&k": "https://host/x?AWSAccessKeyId=***&k",
    **{
        f"{name}={value}": f"{name}=***"
        for name, value in {
            "password": "correct horse",
            "db.password": "x",
            "PASSWD": "x,y",
            "my_secret": "x/y",
            "auth": "me:x",
            "client-secret": "x",
            "DefaultEndpoints;AccountKey": X,
            "authorization": "Bearer x",
            "api_key": "0",
            "AWS_SECRET_ACCESS_KEY": "wJalrXUtn",
            "aws_session_token": "x",
            "passphrase": "a b",
            "credentials": "x",
            "WANDB_API_KEY": "0",
            "private_key": "x",
            "hf_token": "x",
            "GITLAB_DEPLOY_TOKEN": "x",
            "token": "abc123def456",
            "private_token": "abcdef",
            "GITLAB_TOKEN": X,
            "CI_JOB_TOKEN": "64_" + X,
            "pass": "hunter2",
            "PGPASS": "hunter",
            "db.pass": "correct",
            "sig": "ab%2Fcd",
            "X-Goog-Signature": X,
            "DB_PASS": "a/b+c=",
            "passcode": "1234",
            "client_secret": "x",
            "registry_token": "a1/b2" + X,
        }.items()
    },
    **{
        f"{name}:{space}{value}": f"{name}:{space}***"
        for name, space, value in [
            ("password", "", "hunter2"),
            ("password", " ", "correct horse"),
            ("passwd", "", "hunter"),
            ("secret", "", "abc"),
            ("secret", " ", "hunter2"),
            ("api-key", " ", "x"),
            ("X-Api-Key", "", "x"),
            ("auth", " ", "Bearer abc"),
            ("x-auth", " ", "me:x"),
            ("auth", " ", "abcdefg1"),
            ("Authorization", " ", "x"),
            ("Authorization", " ", "Basic " + "dXNlcjpwYXNz"),
        ]
    },
    "PRIVATE-TOKEN: abcdefgh": "PRIVATE-TOKEN: ***",
    f"token: {X}": "token: ***",
    "pass: hunter22": "pass: ***",
    "token=AbcdEfgh": "token=***",
    "https://host/api/webhooks/12/" + "ab-cd": "https://host/api/webhooks/12/***",
    "my secret:hunter2 is here": "my secret:*** is here",
    "pass=hunter2 and more": "pass=*** and more",
    "https://user:pa ss@host/x": "https://***@host/x",
    "ftp://me:a b c@host": "ftp://***@host",
    "Basic " + "dXNlcjpwYXNz": "Basic ***",
    "basic " + "QWxhZGRpbjpvcGVuIHNlc2FtZQ" + "==": "basic ***",
    '{"password": "x"}': '{"password": ***',
    "Authorization: Bearer abc": "Authorization: ***",
    f"Bearer {X}": "Bearer ***",
    f"Basic {X}": "Basic ***",
    **{
        prefix + rest: "***"
        for prefix, rest in [
            ("hf" + "_", X),
            ("gh" + "p_", X),
            ("gho" + "_", "0123456789abcdef"),
            ("github" + "_pat_", X),
            ("gl" + "pat-", X),
            ("glrt" + "-", "t1_" + X),
            ("sk" + "-proj-", "0123456789abcdef"),
            ("sk" + "-ant-", X),
            ("sk" + "_live_", X),
            ("AK" + "IA", "0123456789ABCDEF"),
            ("AS" + "IA", "0123456789ABCDEF"),
            ("xo" + "xb-", "1234-5678-" + X),
            ("xo" + "xp-", "12345678901"),
            ("xa" + "pp-", "1-A-" + X),
            ("AI" + "za", X[:35]),
            ("npm" + "_", X),
            ("pypi" + "-", "AgEIcHlwaS5vcmcCJ" + X),
            ("wandb" + "_v1_", X),
            ("ya" + "29.", X),
            ("dckr" + "_pat_", X),
            ("dop" + "_v1_", HEX),
            ("hv" + "s.", X),
            ("SG" + ".", X + "." + X),
            ("GOC" + "SPX-", X),
            ("nv" + "api-", X),
            ("AS" + "IA", "QWERTZUIOPASDFGH"),
            ("wh" + "sec_", X),
            ("ts" + "key-auth-", "kabc-" + X),
            ("sb" + "p_", HEX),
            ("sb" + "_secret_", X),
            ("gl" + "sa_", X + "_0123abcd"),
            ("key" + "-", "3ax6" * 8),
            ("rk" + "_live_", X),
            ("sk" + "-", "0123456789abcdef" * 2),
            ("sk" + "-", X),
            ("sk" + "-or-v1-", HEX),
            ("sh" + "pat_", HEX[:32]),
            ("x" + "ai-", X),
            ("pp" + "lx-", X),
            ("", JWT),
            ("", HEX),
            ("wJalrXUtnFEMI/K7MDENG", "/bPxRfiCYEXAMPLEKEY"),
            ("", "zK3" + "vT9qLx+" * 5 + "Zm"),
        ]
    },
    f"local-{HEX}": "local-***",
    f"key: {HEX}, and": "key: ***, and",
    "-----BEGIN RSA " + "PRIVATE KEY-----\nx": "***",
    "https://hooks.slack.com/services/" + "T0/B0/x": "https://hooks.slack.com/services/***",
}
ORDINARY = [
    "bundled",
    "glue:sst2",
    "wikitext:wikitext-2-raw-v1",
    "owner/name",
    "/data/imagenet/train",
    "~/corpus/*.txt",
    "C:\\x y",
    "hub/snapshots/0123456789abcdef0123456789abcdef",
    f"/home/me/.cache/huggingface/hub/datasets--a--b/snapshots/{HEX}",
    f"snapshots/{HEX}/train.txt",
    HEX[:39],
    HEX * 2,
    "hf_datasets_of_everybody/*.txt",
    "hf_tokenizers",
    "shelf_" + X,
    "task-" + X,
    "a" * 40,
    "Corpora/En/OpenSubtitles2018/XmlRaw/Part",
    "data/ImageNet2012/train/n01440764/images",
    "0" * 40 + "/x",
    "ThisIsTheFolderOfFortyLettersInCamelCase",
    "THEFOLDERWHICHHASFORTYLETTERSINUPPERCASE",
    "the_folder_of_forty_letters_in_lower_cas",
    "1234567890123456789012345678901234567890/",
    "https://host:8080/a@b",
    "https://host/owner/name@main",
    "https://host/x?lang=en&page=2",
    "abfss://container@account.dfs.core.windows.net/x",
    "ssh://git@host/x.git",
    "git@host:owner/name.git",
    "hdfs://node:9000/x",
    "s3://bucket/key/part-00000",
    "lang=en/token=7/key=3/x.parquet",
    "tokenizer=bpe",
    "author=me",
    "secretary/letters.txt",
    "passwords/rockyou.txt",
    "auth:v1",
    "secrets",
    "keyboard=us",
    "asiapacificlanguagescorpus",
    "npm_packages_of_everybody",
    "pypi-mirror-of-packages",
    "bearer of good news",
    "basic english",
    "eyJ",
    "xoxo",
    "AIzawa",
    "2026-11-22T10:20:30",
    "6f1c2a34-5b6d-7e8f-9a0b-1c2d3e4f5a6b",
    "sk-learn",
    "model.moe.k=2",
    "batch.capacity_group_size=32",
    "node0:29400",
    "data/sk-SK_wikipedia_2023_full.txt",
    "/data/sk-learn-tutorial-corpus/*.txt",
    "sk-wiki-2023-dump-articles",
    "gzipped/basic instruct-tuning-set-v2/*.txt",
    "Basic Instruct2023",
    "basic english/Wiki2023/PartA/x.txt",
    "auth: the first gate",
    "x-auth: off",
    "The Secret: a novel.txt",
    "owner/secret:v1",
    "https://host:80 see a@b.c",
    "tokens",
    "data/tokens.txt",
    "max_tokens=24",
    "model.max_tokens=128",
    "capacity_group_size=4",
    "num_token=4",
    "experts_per_token=2",
    "pad_token=[PAD]",
    "eos_token=<eos>",
    "token=s/book.txt",
    "token=word/part-0.txt",
    "pass=2",
    "low_pass=0.5",
    "two-pass=true",
    "bypass=always",
    "compass=north",
    "trespass=never",
    "signatures=none",
    "/data/session_key=5/x.parquet",
    "corpus/secret=1/a.txt",
    "/data/auth=basic/x.parquet",
    "data/auth=1",
    "eos token=word, pad",
    "token=wordpiece",
    "dropout pass = forward",
    "first pass: 20000000",
    "eos_token=endoftext",
    f"at commit {HEX}",
    f"rev={HEX}",
    "see https://arxiv.org: by me@host",
    "runs/e03f573",
    f"runs/{HEX}",
    f"/x/{HEX}/*.txt",
    "ASIA/PACIFIC",
    "/text/ASIAPACIFICLANGUAGES/x.txt",
    "key-value-store-of-everybody-and-more-words",
    "whsec_folder",
    "tskey-auth",
    "sbp_corpus_of_brazilian_portuguese",
]


@pytest.mark.parametrize("text", MADE_UP)
def test_a_key_is_hidden_and_refused_in_a_config(text: str) -> None:
    assert redact(text) == MADE_UP[text]
    assert redact(f"data.text={text}").startswith("data.text=") and "***" in redact(
        f"data.text={text}"
    )
    with pytest.raises(
        ValueError, match=r"^data.text contains something that looks like a password or a key"
    ) as error:
        check_config(tiny(f"data.text={text}"))
    assert text not in str(error.value) and "HF_TOKEN" in str(error.value)
    for wrong in (f"wandb.api={text}", f"zero_stage={text}", text):
        with pytest.raises(ValueError, match=r"^--set") as error:
            tiny(wrong)
        assert text not in str(error.value)


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_value_is_none(text: str) -> None:
    for each in (text, f"data.text={text}", f"--folder={text}"):
        assert redact(each) == each
    check_config(tiny(f"data.text={text}"))


def test_the_launch_scripts_share_the_list() -> None:
    """By a program that imports the standard library alone, with any bytes in its words."""
    command = [
        sys.executable,
        "-I",
        "-X",
        "importtime",
        ROOT / "moe_dist" / "config" / "redact.py",
        *MADE_UP,
        "plain",
        b"\xff",
        "",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.split(b"\0") == [
        *(each.encode() for each in MADE_UP.values()),
        b"plain",
        b"\xff",
        b"",
        b"",
    ]
    assert not re.search(rb"\b(torch|numpy|moe_dist)\b", done.stderr)


def test_a_long_text_takes_no_time() -> None:
    start = time.process_time()
    texts = (
        "a.",
        "a",
        "aA1/",
        "://a:",
        "eyJ",
        "password",
        "a=",
        "?key",
        "://@:",
        "token=",
        "pass=a/",
        "auth: ",
        "secret:",
    )
    for text in (*texts, "basic aA1", "sk-a-", "/a=", "key-1", "://a: "):
        assert has_secret(text * 3000) in (True, False)
    assert time.process_time() - start < 3
