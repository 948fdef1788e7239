"""The data plane of the hand-off: memory, links, leases and the sessions of both ends.

Life of a hand-off through this package:

1. `HandoffClient.offer` (prefill worker) connects to the decode worker if need be and sends Offer over the control
   channel (signed frames over TCP); `HandoffServer` (decode worker) asks its `BlockReserver` for blocks, opens a lease
   and grants it.
2. `Handoff.layers_ready` is called by the engine as layers are computed; a sender thread hashes and copies the blocks
   over the pair's `Link` (local, shm, tcp). Before the grant the calls are only remembered: compute never waits.
3. `Handoff.complete` sends the manifest, `commit` awaits the answer. The server compares it with what landed, lets the
   reserver admit the sequence and answers Accepted. Any doubt ends in Rejected or a TransferError, and nothing of the
   hand-off is used.
4. A lease that ends in another way is revoked; its blocks stay in quarantine until the writer answered the fence or
   the link proves that it can't write any more.
"""
