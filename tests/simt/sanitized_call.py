"""One call of a sanitized library, in a process that has the sanitizers preloaded and little else (see host.py)."""

import ctypes
import json
import sys
from pathlib import Path


def main(folder: Path) -> int:
    """Run the request; buffers are malloc'ed to their exact size, so an access past an end is seen."""
    request = json.loads((folder / "request.json").read_text())
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    buffers = []
    for i in range(request["buffers"]):
        content = (folder / str(i)).read_bytes()
        buffers.append((libc.malloc(ctypes.c_size_t(len(content))), len(content)))
        ctypes.memmove(buffers[-1][0], content, len(content))
    params = bytearray.fromhex(request["params"])
    for offset, buffer, inside in request["pointers"]:
        params[offset : offset + 8] = (buffers[buffer][0] + inside).to_bytes(8, sys.byteorder)
    lib = ctypes.CDLL(request["library"])
    lib.simt_set_order(ctypes.c_int(request["descending"]))
    message = ctypes.create_string_buffer(1024)
    held = (ctypes.c_char * len(params)).from_buffer(params)
    if lib[request["entry"]](ctypes.byref(held), message, ctypes.c_size_t(1024)):
        print(message.value.decode(), file=sys.stderr)
        return 1
    for i, (address, size) in enumerate(buffers):
        (folder / str(i)).write_bytes(ctypes.string_at(address, size))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
