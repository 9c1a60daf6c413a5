"""The manifest's grammar: what is read, and one line with row and column for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainables.data.manifest import Row, read_manifest

HEADER = "path,role,name,kind,label,domain,split,recording,start_s,end_s"
MACHINE = "a.wav,machine,pump,,normal,target,train,r1,0,2.5"
NOISE = "n.wav,noise,hall,stationary,,,,,,"


@pytest.fixture
def read(tmp_path: Path):
    def from_lines(*lines: str, end: str = "\n") -> list[Row]:
        path = tmp_path / "manifest.csv"
        path.write_bytes((end.join(lines) + end).encode())
        return read_manifest(str(path))

    return from_lines


def test_rows_are_read_as_written(read) -> None:
    machine, noise = read(HEADER, MACHINE, NOISE)
    assert (machine.path, machine.role, machine.name, machine.label) == ("a.wav", "machine", "pump", "normal")
    assert (machine.domain, machine.split, machine.recording) == ("target", "train", "pump/r1")
    assert (machine.start_s, machine.end_s) == (0.0, 2.5)
    assert machine.where.endswith("manifest.csv, row 2")
    assert (noise.role, noise.kind, noise.split, noise.recording) == ("noise", "stationary", "", "hall/n.wav")
    assert (noise.start_s, noise.end_s) == (0.0, None)


def test_what_may_be_left_out(read) -> None:
    (row,) = read("split,path,role,name,kind,label,domain", ",./x/../a.wav,machine,pump,,normal,")
    assert (row.domain, row.split, row.recording, row.start_s, row.end_s) == (
        "source",
        "",
        "pump/a.wav",
        0.0,
        None,
    )


def test_anomalies_test(read) -> None:
    (row,) = read(HEADER, "a.wav,machine,pump,,anomaly,source,,r1,,")
    assert row.split == "test"


def test_spreadsheets_are_read(read) -> None:
    quoted = '"a, b.wav", machine ,pump,,normal,target,train,r1,0,2.5'
    (row,) = read("\ufeff" + HEADER + ",rpm", quoted + ",1400", "", ",,,,,,,,,,", end="\r\n")
    assert (row.path, row.role) == ("a, b.wav", "machine")


def test_cells_of_the_other_role_are_not_read(read) -> None:
    machine, noise = read(
        HEADER,
        "a.wav,machine,pump,loud,normal,source,train,,,",
        "n.wav,noise,hall,stationary,quiet,near,test,,,",
    )
    assert (machine.kind, noise.label, noise.domain) == ("", "", "")


@pytest.mark.parametrize(
    ("line", "column", "parts"),
    [
        ("a.wav,engine,pump,,normal,source,train,r,,", "role", ("'engine'", "machine, noise")),
        ("a.wav,machine,pump,,broken,source,train,r,,", "label", ("'broken'", "normal, anomaly")),
        ("a.wav,machine,pump,,normal,sauce,train,r,,", "domain", ("'sauce'", "did you mean 'source'?")),
        (
            "a.wav,machine,pump,,normal,source,tset,r,,",
            "split",
            ("'tset'", "train, test", "did you mean 'test'?"),
        ),
        ("n.wav,noise,hall,static,,,test,r,,", "kind", ("'static'", "stationary, nonstationary")),
        (",machine,pump,,normal,source,train,r,,", "path", ("empty",)),
        ("a.wav,,pump,,normal,source,train,r,,", "role", ("empty", "machine or noise")),
        ("a.wav,machine,,,normal,source,train,r,,", "name", ("empty",)),
        ("n.wav,noise,hall,,,,test,r,,", "kind", ("empty", "stationary or nonstationary")),
        ("a.wav,machine,pump,,,source,train,r,,", "label", ("empty", "normal or anomaly")),
        ("a.wav,machine,pump,,anomaly,source,train,r,,", "split", ("'train'", "anomaly")),
        ("a.wav,machine,pump,,normal,source,train,r,2,2", "end_s", ("2 is not after start_s = 2",)),
        ("a.wav,machine,pump,,normal,source,train,r,3,2", "end_s", ("2 is not after start_s = 3",)),
        ("a.wav,machine,pump,,normal,source,train,r,-1,2", "start_s", ("'-1'", "seconds from 0")),
        ("a.wav,machine,pump,,normal,source,train,r,nan,2", "start_s", ("'nan'",)),
        ("a.wav,machine,pump,,normal,source,train,r,0,inf", "end_s", ("'inf'",)),
        ("a.wav,machine,pump,,normal,source,train,r,0:00,0:02", "start_s", ("'0:00'", "such as 2.5")),
        ('"a\n.wav",machine,pump,,normal,source,train,r,,', "path", (r"'a\n.wav'", "cannot be printed")),
    ],
)
def test_a_wrong_cell_is_named_by_row_and_column(read, refusal, line: str, column: str, parts) -> None:
    row = 4 if "\n" in line else 3  # a spreadsheet shows the line where the row ends
    with refusal(f"manifest.csv, row {row}, column {column}: ", *parts):
        read(HEADER, MACHINE, line)


@pytest.mark.parametrize("column", ["path", "role", "name", "kind", "label", "domain", "split"])
def test_a_missing_column(read, refusal, column: str) -> None:
    with refusal("row 1", f"column {column} is missing", HEADER):
        read(
            HEADER.replace(f",{column}," if column != "path" else "path,", "," if column != "path" else ""),
            MACHINE,
        )


def test_a_misspelt_column_is_not_taken_for_another_one(read, refusal) -> None:
    with refusal("row 1", "column start_s is missing", "'start'"):
        read(HEADER.replace("start_s", "start"), MACHINE)


def test_semicolons(read, refusal) -> None:
    with refusal("column path is missing", "separated by commas"):
        read(HEADER.replace(",", ";"), MACHINE.replace(",", ";"))


def test_a_doubled_column(read, refusal) -> None:
    with refusal("row 1", "column label appears twice"):
        read(HEADER + ",label", MACHINE + ",normal")


@pytest.mark.parametrize("line", ["a.wav,machine,pump", MACHINE + ",extra"])
def test_a_ragged_row(read, refusal, line: str) -> None:
    with refusal("manifest.csv, row 3: ", f"{line.count(',') + 1} cells under 10 columns"):
        read(HEADER, MACHINE, line)


@pytest.mark.parametrize(
    "line", ['"a.wav,machine', '"a"x,machine,pump,,normal,source,train,r,,', "a" * 200_000]
)
def test_not_csv(read, refusal, line: str) -> None:
    with refusal("manifest.csv, row 2: not CSV"):
        read(HEADER, line)


@pytest.mark.parametrize("lines", [(), ("", ""), (HEADER,), (HEADER, "", ",,,,,,,,,")])
def test_no_rows(read, refusal, lines) -> None:
    with refusal("manifest.csv: holds no rows", HEADER):
        read(*lines)


@pytest.mark.parametrize(
    "content", ["päth".encode("latin-1"), (HEADER + "\n").encode("utf-16"), b"RIFF\xff\xfe"]
)
def test_not_utf8(tmp_path: Path, refusal, content: bytes) -> None:
    (tmp_path / "manifest.csv").write_bytes(content)
    with refusal("manifest.csv: not UTF-8 text", "save the table as CSV in UTF-8"):
        read_manifest(str(tmp_path / "manifest.csv"))


def test_no_manifest(tmp_path: Path, refusal) -> None:
    with refusal("corpus.manifest is not set", "--set corpus.manifest="):
        read_manifest(None)
    with refusal("corpus.manifest = ", "gone.csv", "No such file"):
        read_manifest(str(tmp_path / "gone.csv"))
    with refusal("corpus.manifest = ", "directory"):
        read_manifest(str(tmp_path))


def test_an_environment_of_two_kinds(read, refusal) -> None:
    with refusal("row 3, column kind", "'hall' is nonstationary here and stationary in row 2"):
        read(HEADER, NOISE, "m.wav,noise,hall,nonstationary,,,,,,")
