"""What a run writes about its steps: a table, and events for TensorBoard."""

import csv
import math
from pathlib import Path

import pytest

from threedrec.event_file import EventLog, masked_crc
from threedrec.loggers import CsvLog, file_loggers


def test_the_table_grows_new_columns_and_keeps_its_rows(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "logs", every=2)
    log.log({"fit/loss": 1.5}, 1)
    assert not (tmp_path / "logs").exists()
    log.log({"fit/loss": 0.5}, 2)
    assert len((tmp_path / "logs" / "metrics.csv").read_text().splitlines()) == 3
    log.log({"coarse/loss": 0.25}, 3)
    log.close()
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    assert rows == [
        {"coarse/loss": "", "fit/loss": "1.5", "step": "1"},
        {"coarse/loss": "", "fit/loss": "0.5", "step": "2"},
        {"coarse/loss": "0.25", "fit/loss": "", "step": "3"},
    ]


def test_a_resumed_run_begins_a_new_version(tmp_path: Path) -> None:
    for version in range(2):
        for sink in file_loggers(tmp_path):
            sink.log({"loss": 1.0}, 1)
            sink.close()
        assert (tmp_path / "csv_logs" / f"version_{version}" / "metrics.csv").is_file()
        assert len(list((tmp_path / "tb_logs" / f"version_{version}").glob("events.out.tfevents.*"))) == 1


def test_checksums_are_castagnolis() -> None:
    # CRC-32C of "123456789" is 0xE3069283 (RFC 3720 and elsewhere); the mask is TensorFlow's.
    crc = 0xE3069283
    assert masked_crc(b"123456789") == (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = EventLog(tmp_path)
    for step in (1, 300, 70_000):
        log.log({"fit/loss": 0.5 * step, "fit/rgb": math.nan}, step)
    log.flush()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["fit/loss", "fit/rgb"]
    assert [(event.step, event.value) for event in events.Scalars("fit/loss")] == [
        (1, 0.5),
        (300, 150.0),
        (70_000, 35_000.0),
    ]
    assert all(math.isnan(event.value) for event in events.Scalars("fit/rgb"))
    log.close()
