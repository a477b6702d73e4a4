"""Every container, compressed or not, folders and globs: the same rows with their lines."""

# pyright: reportArgumentType=false, reportCallIssue=false

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_cookbook.exceptions import ConfigurationError, DataError
from tinker_cookbook.supervised.conversations import parse_row
from tinker_cookbook.supervised.sources.containers import open_rows
from tinker_cookbook.supervised.sources.data_spec import data_name, parse_data
from tinker_cookbook.supervised.sources.json_values import JsonValues
from tinker_cookbook.supervised.sources.opening import open_unpacked
from tinker_cookbook.supervised.sources.several import Mix, open_data


def conversation(i: int) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f'say "{i}", [é] \\ {{please}}\nnow'},
        {"role": "assistant", "content": f"reply {i}"},
    ]
    return {"messages": messages}


ROWS = [conversation(i) for i in range(40)]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


def csv_text(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict[str, Any]], writer: Any) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with writer(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)


CONTAINERS = {
    "JSONL": lambda rows: lines(rows),
    "JSON array": lambda rows: json.dumps(rows, indent=2).encode(),
    "JSON array, one line": lambda rows: json.dumps(rows).encode(),
    "JSON objects": lambda rows: b"\n".join(json.dumps(r, indent=1).encode() for r in rows),
    "Parquet": lambda rows: parquet(rows, row_group_size=7),
    "Arrow": lambda rows: arrow(rows, pyarrow.ipc.new_file),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def contents(path: Path | str) -> list[list[Any]]:
    source = open_data(str(path))
    rows = source.rows(range(len(source)))
    source.close()
    return [parse_row(row).messages for row in rows]


EXPECTED = [row["messages"] for row in ROWS]


@pytest.mark.parametrize("container", list(CONTAINERS))
def test_every_container_holds_the_same_rows(tmp_path, container):
    path = write(tmp_path / "chat.data", CONTAINERS[container](ROWS))
    file = open_rows(path)
    assert file.container == container.partition(",")[0]
    assert [parse_row(row).messages for row in file.rows(range(len(file)))] == EXPECTED
    picked = file.rows([39, 0, 17, 17])
    assert [parse_row(row).messages for row in picked] == [EXPECTED[i] for i in (39, 0, 17, 17)]
    assert file.check_rows().num_rows == 40


@pytest.mark.parametrize("suffix", list(PACKERS))
@pytest.mark.parametrize("container", ["JSONL", "JSON array", "Parquet"])
def test_compressed_files_are_known_by_content(tmp_path, container, suffix):
    content = CONTAINERS[container](ROWS)
    plain = open_rows(write(tmp_path / "plain", content))
    packed = open_rows(write(tmp_path / "packed", PACKERS[suffix](content)))
    assert packed.fingerprint == plain.fingerprint
    names = {"gz": "gzip", "zst": "zstd", "bz2": "bzip2", "xz": "xz"}
    assert packed.container == f"{container}, {names[suffix]}"
    assert contents(tmp_path / "packed") == EXPECTED


@pytest.mark.parametrize("suffix", ["zst", "xz"])
def test_cut_off_compressed_files_are_refused(tmp_path, suffix):
    noise = os.urandom(4_000_000)
    path = write(tmp_path / "chat.jsonl", PACKERS[suffix](noise)[:2_000_000])
    with pytest.raises(DataError, match=r"chat\.jsonl: the \w+ file is (cut off|damaged)"):
        open_rows(path)


def test_the_fingerprint_follows_the_content(tmp_path):
    for name, make in CONTAINERS.items():
        files = [open_rows(write(tmp_path / "f", make(rows))) for rows in (ROWS, ROWS, ROWS[1:])]
        same, again, other = (file.fingerprint for file in files)
        assert same == again != other, name


# ---- JSON arrays ----


def test_rows_of_an_array_come_with_their_lines(tmp_path):
    text = b'\xef\xbb\xbf\n[{"text": "a"},\n\n  {"text":\n "b"}\n, {"text": "c"}]\n'
    file = open_rows(write(tmp_path / "f.json", text))
    assert [row.where.rpartition(":")[2] for row in file.rows(range(3))] == ["2", "4", "6"]
    assert [parse_row(row).text for row in file.rows(range(3))] == ["a", "b", "c"]


json_texts = st.text(st.sampled_from('a"\\[]{},\né'), max_size=6)
json_objects = st.dictionaries(json_texts, st.recursive(json_texts, st.lists, max_leaves=4))


@given(st.lists(json_objects, min_size=1, max_size=5), st.booleans(), st.integers(1, 30))
def test_the_scan_finds_every_object_at_any_chunk_size(tmp_path_factory, rows, array, chunk_bytes):
    path = tmp_path_factory.mktemp("scan") / "f.json"
    texts = [json.dumps(row, indent=1, ensure_ascii=False) for row in rows]
    path.write_text("[" + " ,\n".join(texts) + "]" if array else "\n".join(texts))
    opened = open_unpacked(path)
    file = JsonValues(opened, chunk_bytes=chunk_bytes)
    assert [json.loads(row.value) for row in file.rows(range(len(file)))] == rows
    file.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ["no rows"]),
        ("[ 1, 2]", [":1: the file ends with", "1, 2"]),
        ('[{"text": "a"} {"text": "b"}]', [":1:", "a comma between two objects"]),
        ('[{"text": "a"},\n 3, {"text": "b"}]', [":2:", "3", "nothing else"]),
        ('[{"text": "a"},]', ["ends with ',]'", "closing ]"]),
        ('[{"text": "a"}', ["must end with a closing ]"]),
        ('[{"text": "a"},]', ["',]'", "without a comma before it"]),
        ('[{"text": "a"},\n{"text": "b"', [":2:", "has no end"]),
        ('[\n{"text": "a}]', [":2:", "has no end"]),
        ('{\n"text": "a"}\nand', [":3:", "ends with 'and'"]),
    ],
)
def test_damaged_arrays_name_the_line(tmp_path, text, words):
    with pytest.raises(DataError) as info:
        open_rows(write(tmp_path / "f.json", text.encode()))
    for word in [*words, "f.json"]:
        assert word in str(info.value)


def test_a_bad_object_of_an_array_is_refused_by_its_line(tmp_path):
    text = b'[{"text": "a"},\n{"text": nope},\n["x"], {"text": 5}]'
    with pytest.raises(DataError, match=r"f\.json:2: not JSON: .*; fix the object|one JSON"):
        open_rows(write(tmp_path / "f.json", text)).check_rows()


# ---- CSV ----


def test_csv_fields_may_hold_delimiters_quotes_and_line_ends(tmp_path):
    rows = [
        {"instruction": 'say "hi",\nplease', "input": "", "output": "hi; there"},
        {"instruction": "a" * 200_000, "input": "é", "output": "b"},
    ]
    for delimiter in ",;\t|":
        path = write(tmp_path / "f.csv", b"\xef\xbb\xbf" + csv_text(rows, delimiter))
        file = open_rows(path)
        assert [row.value for row in file.rows([1, 0])] == [rows[1], rows[0]]
        assert [file.place(i) for i in (0, 1)] == [2, 4]
        assert [m["content"] for m in parse_row(file.rows([0])[0]).messages] == [
            rows[0]["instruction"],
            "hi; there",
        ]


def test_compressed_csv_is_known_by_its_name_and_content(tmp_path):
    cells = [{"prompt": "a", "completion": f"b {i}"} for i in range(5)]
    for suffix, pack in PACKERS.items():
        file = open_rows(write(tmp_path / f"f.CSV.{suffix}", pack(csv_text(cells))))
        assert [row.value for row in file.rows(range(5))] == cells


def test_csv_cells_hold_messages_as_json(tmp_path):
    cells = [{"messages": json.dumps(row["messages"]), "tools": ""} for row in ROWS]
    assert contents(write(tmp_path / "f.csv", csv_text(cells))) == EXPECTED


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_blank_lines_of_a_csv_file_are_no_rows(tmp_path, line_end):
    text = line_end.join(["prompt,completion", "", "a,b", "", "", "c,d"])
    file = open_rows(write(tmp_path / "f.csv", text.encode()))
    assert (len(file), file.num_blank_lines) == (2, 3)
    assert [file.place(i) for i in (0, 1)] == [3, 6]
    assert [row.value["completion"] for row in file.rows([0, 1])] == ["b", "d"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,completion\na,b,c\n", ["f.csv:2: the row has 3 fields", "names 2", "quotes"]),
        ("prompt,completion\na\n", ["f.csv:2: the row has 1 fields"]),
        ("prompt,completion\na,\n", ["f.csv:2: content of the assistant message is empty"]),
        ("a,b\n1,2\n", ["f.csv:2: messages is missing", "'a', 'b'"]),
        ('prompt,completion\na,b\nc,"d\n\n', ["f.csv", "not CSV", "close every quoted field"]),
        ("prompt,prompt\na,b\n", ["f.csv:1: column 'prompt' is given twice"]),
        ("prompt,completion\n", ["f.csv: the file has no rows"]),
        ("", ["f.csv: the file has no rows"]),
    ],
)
def test_bad_csv_files_name_the_line(tmp_path, text, words):
    with pytest.raises(DataError) as info:
        open_rows(write(tmp_path / "f.csv", text.encode())).check_rows()
    for word in words:
        assert word in str(info.value)


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    for name, content in (("f.csv", b"prompt,completion\na,b\nc,\xff\n"), ("f.txt", b"a\nb\n\xff")):
        with pytest.raises(DataError, match=rf"{name}:3: byte 0xff .* save the file as UTF-8"):
            open_rows(write(tmp_path / name, content)).check_rows()


# ---- tables ----


def test_hugging_face_tables_keep_calls_and_schemas_as_written(tmp_path):
    import datasets

    def row(arguments: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        parameters = {"type": "object", "properties": properties}
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        reply = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "x"}, reply], "tools": [tool]}

    first = row({"city": "Oslo"}, {"city": {"type": "string"}})
    second = row({"a": 1, "b": 2}, {"a": {"type": "integer"}, "b": {"type": "integer"}})
    datasets.Dataset.from_list([first, second]).to_parquet(tmp_path / "f.parquet")
    stored = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] is None
    file = open_rows(tmp_path / "f.parquet")
    for given_row, expected in zip(file.rows([0, 1]), (first, second), strict=True):
        conversation = parse_row(given_row)
        [call] = conversation.messages[1]["tool_calls"]  # pyright: ignore
        function = expected["messages"][1]["tool_calls"][0]["function"]
        assert json.loads(call.function.arguments) == function["arguments"]
        assert conversation.tools[0]["parameters"] == expected["tools"][0]["function"]["parameters"]


def test_tables_may_keep_a_list_for_each_key_of_the_messages(tmp_path):
    by_key = [
        {key: [m[key] for m in row["messages"]] for key in ("role", "content")} for row in ROWS
    ]
    path = write(tmp_path / "f.parquet", parquet([{"messages": columns} for columns in by_key]))
    assert contents(path) == EXPECTED


def test_rows_of_tables_are_named_by_their_number(tmp_path):
    path = write(tmp_path / "f.parquet", parquet([{"text": "a"}, {"text": " "}]))
    with pytest.raises(DataError, match=r"f\.parquet row 2: text is empty"):
        open_rows(path).check_rows()
    with pytest.raises(DataError, match=r"the Parquet file cannot be read .* download it again"):
        open_rows(write(path, path.read_bytes()[:-20]))
    with pytest.raises(DataError, match="no rows"):
        open_rows(write(path, parquet([{"text": "a"}][:0] or [{"text": "a"}])[:0]))


def test_save_to_disk_folders_are_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert contents(tmp_path / "saved") == EXPECTED


# ---- plain text ----


def test_lines_of_a_text_file_are_rows(tmp_path):
    file = open_rows(write(tmp_path / "f.txt", b"one\n\n two \r\n"))
    assert [(r.where.rpartition(":")[2], parse_row(r).text) for r in file.rows([0, 1])] == [
        ("1", "one"),
        ("3", "two"),
    ]
    assert contents(write(tmp_path / "g.txt", lines(ROWS))) == EXPECTED


# ---- folders, globs, several ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "more").mkdir(parents=True)
    write(tmp_path / "data" / "b.json", CONTAINERS["JSON array"](ROWS[10:20]))
    write(tmp_path / "data" / "a.jsonl.gz", gzip.compress(lines(ROWS[:10])))
    write(tmp_path / "data" / "more" / "c.parquet", parquet(ROWS[20:]))
    write(tmp_path / "data" / "README.md", b"read me")
    write(tmp_path / "data" / "LICENSE.txt", b"terms")
    write(tmp_path / "data" / ".hidden.jsonl", b"{}")
    return tmp_path / "data"


def test_a_folder_gives_its_files_in_sorted_order(folder):
    assert contents(folder) == EXPECTED
    source = open_data(str(folder))
    assert source.container == "3 files (1 JSONL, gzip, 1 JSON array, 1 Parquet)"
    assert source.place(9) == f"{folder}/a.jsonl.gz:10"
    assert source.rows([25])[0].where == f"{folder}/more/c.parquet row 6"
    assert source.check_rows().num_rows == 40


def test_a_glob_and_a_list_give_the_same(folder):
    assert contents(f"{folder}/*.json*") == EXPECTED[:20]
    assert contents(f"{folder}/**/*.p*") == EXPECTED[20:]
    assert contents(f"{folder}/more, {folder}/b.json") == EXPECTED[20:] + EXPECTED[10:20]


def test_texts_of_a_folder_count_only_where_there_is_nothing_else(tmp_path):
    write(tmp_path / "a.txt", b"one")
    assert len(open_data(str(tmp_path))) == 1
    write(tmp_path / "b.jsonl", lines(ROWS))
    assert len(open_data(str(tmp_path))) == 40


def test_a_folder_of_several_splits_is_refused(tmp_path):
    write(tmp_path / "train-00000-of-00001.parquet", parquet(ROWS))
    write(tmp_path / "test-00000-of-00001.parquet", parquet(ROWS))
    with pytest.raises(
        DataError, match=r"several splits \(test-.*, train-.*\); name one .*train\*"
    ):
        open_data(str(tmp_path))
    assert contents(f"{tmp_path}/**/train*") == EXPECTED
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "testimony.parquet")
    assert len(open_data(str(tmp_path))) == 80


def test_names_with_commas_and_colons_are_files_if_they_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c:0.5"):
        write(tmp_path / name, lines(ROWS[:3]))
        assert [part.path for part in parse_data(name)] == [name]
        assert len(open_data(name)) == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a.jsonl:0.7,b.jsonl", ["weight at some places only"]),
        ("a.jsonl:0,b.jsonl:1", ["weight=0 of a.jsonl", "not above 0"]),
        ("a.jsonl:-1,b.jsonl:1", ["weight=-1 of a.jsonl"]),
        ("a.jsonl,,b.jsonl", ["names no file between two commas"]),
        ("*.nothing", ["*.nothing matches no file"]),
        ("empty", ["empty is a folder without data files (it has notes.md)", ".jsonl", ".gz"]),
        ("nothing.jsonl", ["nothing.jsonl: the file does not exist"]),
    ],
)
def test_bad_names_and_weights_are_refused(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", lines(ROWS))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty" / "notes.md", b"")
    with pytest.raises((DataError, ConfigurationError)) as info:
        open_data(data)
    for word in words:
        assert word in str(info.value)


def test_the_name_of_a_run_comes_from_its_data():
    assert data_name("chats/a.jsonl.gz") == "a"
    assert data_name("a.jsonl:0.7,data/b.parquet:0.3") == "a+b"
    assert data_name("data/*.jsonl") == "data"


# ---- mixes ----


def parts(*sizes: int) -> list[Any]:
    import numpy as np

    starts = np.cumsum([0, *sizes])
    return [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def test_weights_are_shares_of_the_rows_of_an_epoch():
    mix = Mix.by_weights(parts(100, 1000), [0.7, 0.3], until="first_exhausted", seed=0)
    assert mix.counts == (100, 43)  # 100 : 43 = 0.7 : 0.3, and the first file is through
    epochs = [mix(seed).tolist() for seed in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == 143
        assert set(range(100)) < set(rows)
    assert set(epochs[0]) != set(epochs[1]), "every epoch draws other rows of the long file"


def test_all_exhausted_repeats_short_files_evenly():
    mix = Mix.by_weights(parts(10, 100), [1, 2], until="all_exhausted", seed=0)
    assert mix.counts == (50, 100)
    rows = mix(3).tolist()
    assert sorted(rows) == sorted([*range(10)] * 5 + [*range(10, 110)])


def test_files_are_mixed_throughout_an_epoch():
    mix = Mix.by_weights(parts(500, 500), [1, 1], until="first_exhausted", seed=0)
    first = sum(row < 500 for row in mix(0)[:100].tolist())
    assert 25 < first < 75
