"""Reads what wandb wrote offline, for which it has no Python reader of its own."""

import json
import pathlib
import struct

from wandb.proto.wandb_internal_pb2 import Record


def wandb_records(path: pathlib.Path) -> list[Record]:
    """Reads a .wandb file: a 7 byte header, then LevelDB log blocks of 32 KiB whose chunks make up
    the records.
    """
    data, position, record, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left  # no chunk header fits: the block ends with padding
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # FULL or LAST
            records.append(Record.FromString(record))
            record = b""
    return records


def records_of(folder: pathlib.Path) -> list[Record]:
    """Returns the records of the one offline run in wandb's folder."""
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    return wandb_records(path)


def wandb_log(run: pathlib.Path) -> tuple[str, dict, list[dict]]:
    """Returns the run id, the config and the history lines of the one offline log in the folder of
    a run.
    """
    records = records_of(run)
    (first,) = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    history = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.HasField("history")
    ]
    return first.run_id, config, history
