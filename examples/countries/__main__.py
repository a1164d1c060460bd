"""`python -m examples.countries`: what to try, then the server."""

import os

from .app import create_app
from .data import DEMO_KEY

TRY = """
  The countries of the world, by Sanic and SQLAlchemy. Try, in another terminal:

  curl {url}/
  curl '{url}/countries?name=land'
  curl {url}/countries/fr
  curl {url}/subdivisions
  curl {url}/subdivisions/fr-29
  curl {url}/countries/gb/subdivisions.csv
  curl -X POST {url}/countries/fr/visits
  curl -H 'X-API-Key: {key}' -d '{{"text": "The cheese!"}}' {url}/countries/fr/notes
  curl {url}/countries/fr/notes
  curl {url}/notes/pages/1
  curl -H 'X-API-Key: {key}' -X DELETE {url}/notes/1
  curl -d '{{"name": "Grace", "key": "let-grace-in"}}' {url}/readers    # again, and it is a 409
  curl {url}/health/ready
  curl {url}/metrics
  python -m websockets {ws}/search          then type: wales
  sanic examples.countries.app:create_app exec counts

"""


def main() -> None:
    port = int(os.environ.get("PORT", "8000"))
    print(TRY.format(url=f"http://127.0.0.1:{port}", ws=f"ws://127.0.0.1:{port}", key=DEMO_KEY))
    create_app().run(host="127.0.0.1", port=port, single_process=True, motd=False)


if __name__ == "__main__":
    main()
