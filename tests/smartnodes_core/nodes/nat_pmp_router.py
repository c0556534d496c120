"""A router's NAT-PMP (RFC 6886): `nat_pmp_router.py OUTSIDE_ADDRESS OUTSIDE_INTERFACE`; mappings are iptables rules."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys


def main() -> None:
    address, interface = sys.argv[1:]
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("0.0.0.0", 5351))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        request, sender = udp.recvfrom(64)
        if request[1] == 0:
            udp.sendto(struct.pack("!BBHI4s", 0, 0x80, 0, 1, socket.inet_aton(address)), sender)
            continue
        _, _, _, inside, _, lifetime_s = struct.unpack("!BBHHHI", request)
        outside = 40_000
        change = "-A" if lifetime_s else "-D"
        to, port = f"{sender[0]}:{inside}", str(inside)
        rules = (
            f"-t nat {change} PREROUTING -i {interface} -p tcp --dport {outside} -j DNAT --to-destination {to}",
            f"{change.replace('-A', '-I')} FORWARD -i {interface} -p tcp -d {sender[0]} --dport {port} -j ACCEPT",
        )
        for rule in rules:
            subprocess.run(["iptables", *rule.split()], check=True)
        udp.sendto(struct.pack("!BBHIHHI", 0, 0x82, 0, 1, inside, outside if lifetime_s else 0, lifetime_s), sender)


if __name__ == "__main__":
    main()
