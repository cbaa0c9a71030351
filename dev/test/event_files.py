"""Reads the event files of --tensorboard with nothing but their description: TFRecords of protocol-buffer messages."""
import struct
from pathlib import Path


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def fields(data):
    """(number, value) of a message: integers of varints, bytes of everything else."""
    at, out = 0, []
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at:at + size], at + size
        out.append((key >> 3, value))
    return out


def records(path):
    """Fields of the events of a file, each a dictionary; their checksums must be right."""
    data, at, out = Path(path).read_bytes(), 0, []
    while at < len(data):
        size, check = struct.unpack("<QI", data[at:at + 12])
        body = data[at + 12:at + 12 + size]
        assert check == masked(data[at:at + 8]) and struct.unpack("<I", data[at + 12 + size:at + 16 + size])[0] == masked(body), path
        out.append(dict(fields(body)))
        at += 16 + size
    return out


def doubles(data):
    return list(struct.unpack(f"<{len(data) // 8}d", data))


def values(event):
    """tag -> float, or of a histogram {min, max, num, limits, counts}."""
    out = {}
    for _, value in fields(event.get(5, b"")):
        value = dict(fields(value))
        tag = value[1].decode()
        if 2 in value:
            out[tag] = struct.unpack("<f", value[2])[0]
        else:
            h = dict(fields(value[5]))
            number = lambda field: struct.unpack("<d", h[field])[0] if field in h else 0.0
            out[tag] = {"min": number(1), "max": number(2), "num": number(3), "limits": doubles(h[6]), "counts": doubles(h[7])}
    return out
