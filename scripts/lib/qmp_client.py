"""Commands a daemon with qemu.qmp, QEMU's client library: MONITOR-SOCKET SOCKET-FOR-A-SECOND-DISK. Exit status 1 says what
was not as that library, or its users, expect."""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient


async def refused(client, command, arguments, error_class):
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        assert error.error_class == error_class, f"{command}: {error.error_class}: {error}"
        return str(error)
    raise AssertionError(f"{command} {arguments} is not refused")


async def main(monitor, second):
    client = QMPClient("test")
    await client.connect(monitor)
    assert client.greeting.QMP.version["qemu"]["major"] >= 0
    assert "oob" in client.greeting.QMP.capabilities

    commands = {entry["name"] for entry in await client.execute("query-commands")}
    schema = {entry["name"]: entry for entry in await client.execute("query-qmp-schema")}
    assert commands == {name for name, entry in schema.items() if entry["meta-type"] == "command"}

    await refused(client, "no-such-command", {}, "CommandNotFound")
    await refused(client, "eject", {"id": "no"}, "DeviceNotFound")
    assert "size" in await refused(client, "block_resize", {"device": "disk"}, "GenericError")

    deleted = EventListener("BLOCK_EXPORT_DELETED")
    with client.listen(deleted):
        await client.execute("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 1 << 20})
        address = {"type": "unix", "path": second}
        export = {"type": "vhost-user-blk", "id": "second", "node-name": "n", "addr": address, "writable": True}
        await client.execute("block-export-add", export)
        assert {entry["id"] for entry in await client.execute("query-block-exports")} == {"disk", "second"}
        await client.execute("block-export-del", {"id": "second"})
        event = await asyncio.wait_for(deleted.get(), 10)
        assert event["data"] == {"id": "second"} and event["timestamp"]["seconds"] > 1_600_000_000, event
    await client.execute("blockdev-del", {"node-name": "n"})

    await client.execute("block_resize", {"device": "disk", "size": 32 << 20})
    (disk,) = await client.execute("query-block")
    assert disk["inserted"]["image"]["virtual-size"] == 32 << 20, disk
    # Many at once, which come back in order.
    versions = await asyncio.gather(*(client.execute("query-version") for _ in range(100)))
    assert all(version == versions[0] for version in versions)
    answer = await client.execute_msg(client.make_execute_msg("query-version", oob=False))
    assert answer == versions[0]

    other = QMPClient("other")
    await other.connect(monitor)
    shutdown = EventListener("SHUTDOWN")
    with other.listen(shutdown):
        await client.execute("quit")
        event = await asyncio.wait_for(shutdown.get(), 10)
        assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}, event
    for each in (client, other):
        try:
            await each.disconnect()
        except EOFError:
            pass  # The daemon closed first, as it should.


asyncio.run(main(*sys.argv[1:]))
