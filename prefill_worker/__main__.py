"""`python -m prefill_worker --config FILE`."""

from llm_engine.serving.process import exit_process
from prefill_worker.main import main

exit_process(main())
