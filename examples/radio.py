#!/usr/bin/env python3
"""What the experiment measures; a real one would have its radio here.

radio.py receive FILE            listens, and writes its port into FILE
radio.py send ADDRESS PORT RATE  sends for a moment at RATE (Mbit/s), prints the loss
"""

import os
import socket
import sys
import time


def receive(file: str) -> None:
    with socket.create_server(("", 0)) as server:
        with open(f"{file}.new", "w") as new:
            print(server.getsockname()[1], file=new)
        os.rename(new.name, file)  # the port is there, whole, or it is not
        while True:
            peer = server.accept()[0]
            with peer:
                rate = float(peer.recv(100))
                peer.sendall(b"%d" % (rate * rate / 100 + rate % 7))


def send(address: str, port: str, rate: str) -> None:
    if float(rate) <= 0:
        sys.exit(f"radio: nothing can be sent at {rate} Mbit/s")
    time.sleep(1 / float(rate))  # a Mbit takes so long
    with socket.create_connection((address, int(port))) as peer:
        peer.sendall(rate.encode())
        print(f"{rate} Mbit/s: {peer.recv(100).decode()} % lost")


if __name__ == "__main__":
    {"receive": receive, "send": send}[sys.argv[1]](*sys.argv[2:])
