"""Pack Zero-1-to-3 renderings (folders of 000.png, 000.npy, …, 011.npy) into WebDataset shards.

    python scripts/objaverse_renderings_to_webdataset.py --paths_json_path=valid_paths.json --basepath=views_release

writes objaverse_rendering_train_000000.tar, … and objaverse_rendering_valid_000000.tar, … (the first 99 % of the list
and the rest). An interrupted run goes on with the same command. Objects with a missing or damaged file are skipped and
listed, with the reason, in objaverse_rendering_train.json and objaverse_rendering_valid.json.

Exit codes: 0 all objects are packed, 1 some were skipped, 2 a mistake in the command, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.shards import ShardOptions, ShardWriter, read_paths, split_names

PREFIX = "objaverse_rendering"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--paths_json_path", type=Path, required=True, help="JSON list of the objects' folders")
    add("--basepath", type=Path, default=Path(), help="folder that holds these folders (default: this one)")
    add("--output_dir", type=Path, default=Path(), help="folder for the shards (default: this one)")
    add("--maxcount_per_file", type=int, default=100_000, help="objects per shard at most (default 100000)")
    add("--maxsize_in_bytes_per_file", type=float, default=1e9, help="bytes that close a shard (default 1e9)")
    add("--views", type=int, default=12, help="views per object (default 12)")
    add("--workers", type=int, default=4, help="threads that read and check (default 4)")
    return parser.parse_args()


def pack(options: argparse.Namespace) -> int:
    """Pack both splits, showing progress; returns how many objects were skipped."""
    limits = ShardOptions(options.maxcount_per_file, options.maxsize_in_bytes_per_file, options.views)
    names = read_paths(options.paths_json_path)
    if not options.basepath.is_dir():
        raise InputError(f"{options.basepath}: no such folder; give --basepath, which holds the objects' folders")
    splits = dict(zip(("train", "valid"), split_names(names), strict=True))
    skipped = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for split, part in splits.items():
            if not part:
                continue
            writer = ShardWriter(part, options.basepath, options.output_dir, f"{PREFIX}_{split}", limits)
            task = progress.add_task(split, total=len(part), completed=writer.done)
            for _ in writer.write(options.workers):
                progress.advance(task)
            skipped += len(writer.broken)
            done = len(part) - len(writer.broken)
            progress.console.print(f"{split}: {done} objects in {len(writer.shards)} shards", highlight=False)
    return skipped


def main() -> int:
    """Pack; see the module for exit codes."""
    options = parse_arguments()
    try:
        skipped = pack(options)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; go on with the same command\n")
        return 130
    if skipped:
        records = options.output_dir / f"{PREFIX}_*.json"
        sys.stderr.write(f"{skipped} objects were skipped; the reasons are under 'broken' in {records}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
