"""Small ICC profiles, made here: matrix profiles of displays, a grey one, and a damaged one."""

import struct


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _gamma(value: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + _fixed(value)


def _srgb_curve() -> bytes:
    values = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + b"".join(map(_fixed, values))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(encoded), 28) + encoded


def _profile(space: bytes, name: str, tags: list[tuple[bytes, bytes]]) -> bytes:
    tags = [(b"desc", _text(name)), (b"cprt", _text("none")), (b"wtpt", _xyz(0.9642, 1, 0.82491)), *tags]
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for signature, content in tags:
        content += b"\0" * (-len(content) % 4)
        table += signature + struct.pack(">II", start + len(data), len(content))
        data += content
    header = struct.pack(">I", start + len(data)) + b"none" + struct.pack(">I", 0x04000000) + b"mntr" + space + b"XYZ "
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(24) + bytes(4)
    header += _fixed(0.9642) + _fixed(1) + _fixed(0.82491)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data


def _display(name: str, red: bytes, green: bytes, blue: bytes, curve: bytes) -> bytes:
    columns = [(b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue)]
    return _profile(b"RGB ", name, columns + [(tag, curve) for tag in (b"rTRC", b"gTRC", b"bTRC")])


def display_p3() -> bytes:
    red, green, blue = _xyz(0.51512, 0.2412, -0.00105), _xyz(0.29198, 0.69225, 0.04189), _xyz(0.1571, 0.06657, 0.78407)
    return _display("Display P3", red, green, blue, _srgb_curve())


def srgb() -> bytes:
    red, green, blue = _xyz(0.43607, 0.22249, 0.01392), _xyz(0.38515, 0.71687, 0.09708), _xyz(0.14307, 0.06061, 0.7141)
    return _display("one more sRGB", red, green, blue, _srgb_curve())


def grey(gamma: float) -> bytes:
    return _profile(b"GRAY", "grey", [(b"kTRC", _gamma(gamma))])


def damaged() -> bytes:
    return display_p3()[:200]


def press() -> bytes:
    """A CMYK profile by which magenta and yellow together are the grey of L* = 80, white is white, and the rest is black."""
    corners = bytearray()
    for i in range(16):  # cyan varies slowest
        lightness = {0b0000: 255, 0b0110: 204}.get(i, 0)
        corners += bytes([lightness, 128, 128])
    ramp = bytes(range(256))
    identity = b"".join(map(_fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(corners) + ramp * 3
    content = _profile(b"CMYK", "press", [(b"A2B0", table)])
    return content[:12] + b"prtr" + content[16:20] + b"Lab " + content[24:]
