"""features, batch by batch -> [feature_files] -> one safetensors or Parquet file, whatever its size in memory.

safetensors: a row per sample of the dataset, in its order; row i is sample i, and a sample that could not be read is a
row of NaN with label -1. The file is laid out first and filled in place. Parquet: a row per sample that could be read,
with its `sample_id`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray]
_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


class SafetensorsRows:
    """A safetensors file with one tensor per column, filled row by row.

    Args:
        columns: shape of one row and dtype, by name.
    """

    def __init__(
        self, path: Path, num_rows: int, columns: dict[str, tuple[tuple[int, ...], str]], about: dict[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": about}
        end = 0
        for name, (shape, dtype) in columns.items():
            start, end = end, end + num_rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": [num_rows, *shape], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # plain writes and no memory map: on a full disk the one raises OSError, the other kills the process
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._columns = columns
        self._starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in columns}

    def write(self, sample_ids_B: NDArray[np.int64], columns: Columns) -> None:
        """Puts a batch into the rows of its samples."""
        for name, values in columns.items():
            row_bytes = values[0].nbytes
            for index, row in zip(sample_ids_B.tolist(), values, strict=True):
                self._file.seek(self._starts[name] + index * row_bytes)
                self._file.write(row.tobytes())

    def close(self, missing: NDArray[np.int64]) -> None:
        """Marks the rows of samples that never came and ends the file."""
        for name, (shape, dtype) in self._columns.items():
            rows = np.full((len(missing), *shape), -1 if dtype == "int64" else np.nan, dtype)
            if len(rows):
                self.write(missing, {name: rows})
        self._file.close()


class ParquetRows:
    """A Parquet file with a list column per feature, a row group per batch. Needs pyarrow."""

    def __init__(self, path: Path, columns: dict[str, tuple[tuple[int, ...], str]], about: dict[str, str]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError("Parquet needs pyarrow: pip install pyarrow, or give --out FILE.safetensors") from error
        self._pyarrow = pyarrow
        fields = [("sample_id", pyarrow.int64())]
        for name, (shape, dtype) in columns.items():
            kind = pyarrow.from_numpy_dtype(np.dtype(dtype))
            fields.append((name, pyarrow.list_(kind, int(np.prod(shape))) if shape else kind))
        shapes = {f"shape.{name}": json.dumps(shape) for name, (shape, _) in columns.items() if shape}
        self._schema = pyarrow.schema(fields, metadata=about | shapes)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, sample_ids_B: NDArray[np.int64], columns: Columns) -> None:
        """Appends a batch."""
        arrays = [self._pyarrow.array(sample_ids_B)]
        for values in columns.values():
            flat = self._pyarrow.array(values.reshape(-1))
            arrays.append(
                self._pyarrow.FixedSizeListArray.from_arrays(flat, values[0].size) if values.ndim > 1 else flat
            )
        self._writer.write_table(self._pyarrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self, missing: NDArray[np.int64]) -> None:
        """Ends the file; samples that never came have no row."""
        self._writer.close()
