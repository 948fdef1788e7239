"""The shell around an engine: request plane, step thread, load reports, metrics, start-up checks, process life cycle.

life of a request: request_plane (asyncio) → worker role → step_loop inbox → engine on the step thread
                   → one delivery a step back to asyncio → request_plane → router
"""
