"""A server of Google Cloud Storage in memory: python gcs_server.py PORT.

The emulator leaves out a header by which clients tell that an object has been
written since they read it, and answers one request at a time.
"""

import http.server
import sys

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

_download = objects.download


def _with_generation(request, response, storage, *args, **kwargs):
  _download(request, response, storage, *args, **kwargs)
  if response.status < 400:
    names = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]


if __name__ == "__main__":
  objects.download = _with_generation
  http.server.HTTPServer.request_queue_size = 128
  server.Server(
    "127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket"
  ).run()
