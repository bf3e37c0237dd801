// Makes the page work without a network after the first load: answers are kept, and given where none can be fetched.
const KEPT = "a2fpn-page";
// WebAssembly has several threads only on a page that is isolated from other sites. Static hosts do not say so.
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

self.addEventListener("install", (event) => event.waitUntil(self.skipWaiting()));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event));
});

async function answer(event) {
  const kept = await caches.open(KEPT);
  try {
    const response = isolated(await fetch(event.request));
    if (response.ok) event.waitUntil(kept.put(event.request, response.clone()));
    return response;
  } catch (error) {
    const response = await kept.match(event.request, { ignoreSearch: true });
    if (response) return response;
    throw error;
  }
}

function isolated(response) {
  const headers = new Headers(response.headers);
  Object.entries(ISOLATION).forEach(([name, value]) => headers.set(name, value));
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
