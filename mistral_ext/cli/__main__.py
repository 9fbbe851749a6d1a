import sys

from mistral_ext.cli import main

sys.exit(main())
