@echo off
rem Side-Step for Windows: double-click this file. It can be run again at any time; what is there already is kept.
rem It installs uv, Python and the packages into this folder, PyTorch for this machine's GPU, and a shortcut to the wizard.
rem A crashed program ends with a negative status, which "if errorlevel 1" does not see: statuses are compared with 0.

setlocal EnableExtensions DisableDelayedExpansion
title Side-Step installation
cd /d "%~dp0"
echo.
echo Side-Step installation, in "%CD%"
echo.

rem --- 1. The folder -----------------------------------------------------------------------------------------------
if not exist "train.py" goto no_files
set "HERE=%CD%\"
if not "%HERE:\OneDrive=%"=="%HERE%" echo NOTE: this folder is inside OneDrive. A folder such as C:\Side-Step is faster and never half synchronised.

rem Packages nest deeply: without long paths, a folder name of more than about 80 characters makes them fail to unpack.
set "LONG_PATHS=0x0"
for /f "tokens=3" %%v in ('reg query "HKLM\SYSTEM\CurrentControlSet\Control\FileSystem" /v LongPathsEnabled 2^>nul') do set "LONG_PATHS=%%v"
if "%LONG_PATHS%"=="0x1" goto folder_is_good
if not "%HERE:~81,1%"=="" goto too_long
:folder_is_good

rem --- 2. The graphics driver --------------------------------------------------------------------------------------
nvidia-smi >nul 2>nul
if "%ERRORLEVEL%"=="0" (
    echo NVIDIA driver: found.
) else (
    echo NOTE: no working NVIDIA driver was found. Side-Step then trains on the CPU, which is slow.
    echo If this machine has an NVIDIA card, install its driver first, then run this file again.
)

rem --- 3. uv, which brings Python and the packages -----------------------------------------------------------------
set "PATH=%USERPROFILE%\.local\bin;%LOCALAPPDATA%\Microsoft\WinGet\Links;%PATH%"
where uv >nul 2>nul
if "%ERRORLEVEL%"=="0" goto uv_is_there
echo Installing uv ...
where winget >nul 2>nul
if "%ERRORLEVEL%"=="0" winget install --id astral-sh.uv --exact --silent --accept-source-agreements --accept-package-agreements
where uv >nul 2>nul
if "%ERRORLEVEL%"=="0" goto uv_is_there
powershell -NoProfile -ExecutionPolicy Bypass -Command "irm https://astral.sh/uv/install.ps1 | iex"
where uv >nul 2>nul
if not "%ERRORLEVEL%"=="0" goto no_uv
:uv_is_there

echo Installing Python and the packages ...
uv sync --inexact
if not "%ERRORLEVEL%"=="0" goto no_packages

rem --- 4. PyTorch for this machine: uv looks at the driver and takes the build that fits -----------------------------
echo Installing PyTorch for this machine ...
uv --no-config pip install "torch>=2.11,<2.15" --torch-backend=auto
if not "%ERRORLEVEL%"=="0" goto no_torch

rem --- 5. Does it work? --------------------------------------------------------------------------------------------
uv run --no-sync train.py --plain doctor
if not "%ERRORLEVEL%"=="0" goto check_failed

rem --- 6. A shortcut to the wizard, beside this file and on the desktop -----------------------------------------------
set "NEW=Side-Step.bat"
>"%NEW%" echo @echo off
>>"%NEW%" echo title Side-Step
>>"%NEW%" echo cd /d "%%~dp0"
>>"%NEW%" echo set "PATH=%%USERPROFILE%%\.local\bin;%%LOCALAPPDATA%%\Microsoft\WinGet\Links;%%PATH%%"
>>"%NEW%" echo uv run --no-sync train.py %%*
>>"%NEW%" echo set "STATUS=%%ERRORLEVEL%%"
>>"%NEW%" echo if not "%%STATUS%%"=="0" pause
>>"%NEW%" echo exit /b %%STATUS%%
set "TARGET=%HERE%%NEW%"
set "FOLDER=%CD%"
powershell -NoProfile -Command "$s = (New-Object -ComObject WScript.Shell); $l = $s.CreateShortcut((Join-Path $s.SpecialFolders('Desktop') 'Side-Step.lnk')); $l.TargetPath = $env:TARGET; $l.WorkingDirectory = $env:FOLDER; $l.Save()"
if not "%ERRORLEVEL%"=="0" echo NOTE: no shortcut could be put on the desktop. Start the wizard with Side-Step.bat in this folder.

echo.
echo Done. Start the wizard with the shortcut Side-Step on the desktop, or with Side-Step.bat in this folder.
echo In a terminal: uv run --no-sync train.py
echo.
pause
exit /b 0

:no_files
echo ERROR: train.py is not in this folder. Unpack the whole archive, then run this file from there.
goto failed

:too_long
echo ERROR: the path of this folder is too long for Windows as it is set up here.
echo Move the folder to a short path such as C:\Side-Step, or switch long paths on in a terminal run as administrator:
echo   reg add HKLM\SYSTEM\CurrentControlSet\Control\FileSystem /v LongPathsEnabled /t REG_DWORD /d 1 /f
goto failed

:no_uv
echo ERROR: uv could not be installed. Install it by hand from https://docs.astral.sh/uv and run this file again.
goto failed

:no_packages
echo ERROR: the packages could not be installed. The lines above say why; a virus scanner or a full disk are the usual reasons.
goto failed

:no_torch
echo ERROR: PyTorch could not be installed. Run this file again; what is there already is kept.
goto failed

:check_failed
echo ERROR: the check failed. If it speaks of a DLL, install the Microsoft Visual C++ Redistributable (x64) and run this file again.

:failed
echo.
echo The installation is not complete. Nothing that was there before has been removed.
pause
exit /b 1
