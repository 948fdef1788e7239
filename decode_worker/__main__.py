"""`python -m decode_worker --config FILE`."""

from decode_worker.main import main
from llm_engine.serving.process import exit_process

exit_process(main())
