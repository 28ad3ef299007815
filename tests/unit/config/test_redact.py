"""Keys and passwords are hidden, and rejected in a config; ordinary values are not."""

import pytest
from made_up_keys import HEX, MADE_UP, X
from runs import tiny

from moe_dist.config.redact import redact
from moe_dist.config.validate import check_config

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
def test_key_is_hidden_and_rejected_in_a_config(text: str) -> None:
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
def test_ordinary_value_is_not_redacted(text: str) -> None:
    for each in (text, f"data.text={text}", f"--folder={text}"):
        assert redact(each) == each
    check_config(tiny(f"data.text={text}"))
