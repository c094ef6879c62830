-- SPDX-License-Identifier: LGPL-2.1-or-later
--
-- To which worker Dovecot's proxy sends a user. Dovecot's auth process runs this;
-- conf.d/proxy-2.3.conf and proxy-2.4.conf have the settings. It needs Debian's
-- dovecot-auth-lua and Lua 5.3 or later.
--
-- crdt-watch(8) writes hosts_file, a small file that is read at each login. Nothing else is
-- asked, so that logins go on while crdt-watch is down.
--
-- No password is looked at here: the worker does that. So the answer must never be taken for
-- one of a password that is right. It says so only to services that do nothing but hand it on.

local hosts_file = "/var/lib/crdt-watch/hosts"

-- Of Dovecot's, and they proxy. Above all not "smtp": a Postfix that asks Dovecot for
-- SMTP AUTH would let everybody in.
local proxies = { imap = true, pop3 = true, lmtp = true, submission = true, sieve = true, doveadm = true }

-- Dovecot 2.3 has no settings for a script, and wants a number.
function script_init(settings)
  hosts_file = settings and settings.hosts_file or os.getenv("CRDT_HOSTS_FILE") or hosts_file
  return 0
end

-- doc/FORMATS.md has the score; watch/rendezvous.c computes the same.
local function score(user, worker)
  local text = user .. "\0" .. worker
  local hash = 0xcbf29ce484222325
  for i = 1, #text do
    hash = (hash ~ text:byte(i)) * 0x100000001b3
  end
  hash = (hash ~ (hash >> 33)) * 0xff51afd7ed558ccd
  hash = (hash ~ (hash >> 33)) * 0xc4ceb9fe1a85ec53
  return hash ~ (hash >> 33)
end

-- The address of the user's worker, or nil and why there is none.
local function worker_of(user)
  local file, problem = io.open(hosts_file)
  if file == nil then
    return nil, problem
  end
  local best_score, best_name, best_address
  for line in file:lines() do
    local name, address, state = line:match("^([^\t]+)\t([^\t]+)\t([^\t]+)$")
    if state == "up" then
      local mine = score(user, name)
      if best_name == nil or math.ult(best_score, mine) or (mine == best_score and name < best_name) then
        best_score, best_name, best_address = mine, name, address
      end
    end
  end
  file:close()
  return best_address, hosts_file .. ": no worker is up"
end

function auth_passdb_lookup(request)
  local service = request.protocol or request.service     -- of 2.4, of 2.3
  if not proxies[service] then
    return dovecot.auth.PASSDB_RESULT_USER_UNKNOWN, "crdt-proxy: not for " .. tostring(service)
  end
  local address, problem = worker_of(request.user)
  if address == nil then
    request:log_error("crdt-proxy: " .. problem)
    return dovecot.auth.PASSDB_RESULT_INTERNAL_FAILURE, problem
  end
  -- No port: all of these would use it. No multiplexing, which 2.4.1 uses to a worker that has
  -- 2.4 too: on a busy machine it leaves the first command of every fiftieth session unanswered.
  return dovecot.auth.PASSDB_RESULT_OK, {
    proxy = "yes", nopassword = "yes", host = address, proxy_no_multiplex = "yes"
  }
end
